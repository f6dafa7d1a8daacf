// Mochi Video in the page: panels below our nodes, messages, menu entries. What each does is in its own file.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { askAgain, CostLine } from './cost.js'
import { asCurl, asPrompt, asPython, copyGraph } from './export.js'
import { nodeOf, rootGraph } from './graph.js'
import { chain, element } from './panel.js'
import { Player } from './player.js'
import { Preview } from './preview.js'
import { keepToGrid } from './size.js'
import { loadText, text } from './text.js'

/** @typedef {import('./types/host.js').Node} Node */

const WARNING_SECONDS = 12
const PREFIX = 'MochiVideo'

/** @type {Map<Node, Preview>} */
const previews = new Map()
/** @type {Map<Node, Player>} */
const players = new Map()
// What was decoded, by workflow and node: a graph is built anew when something is undone.
/** @type {Map<string, unknown>} */
const decoded = new Map()

/** @param {string} name */
const isOn = (name) => app.extensionManager.setting.get(`${PREFIX}.${name}`) !== false

/** @type {Record<string, (node: Node) => void>} */
const panels = {
  MochiVideoSize(node) {
    keepToGrid(node)
    if (isOn('Cost')) new CostLine(node)
  },
  MochiVideoSampler(node) {
    if (isOn('Cost')) new CostLine(node)
    if (isOn('Preview')) keep(previews, node, new Preview(node))
  },
  MochiVideoDecode(node) {
    if (!isOn('Player')) return
    const player = new Player(node)
    keep(players, node, player)
    chain(node, 'onExecuted', (output) => {
      if (output?.mochi_video) decoded.set(placeOf(node), output.mochi_video)
      player.show(output?.mochi_video)
    })
  }
}

/**
 * Remembers a node's panel for as long as there is the node.
 * @template Panel
 * @param {Map<Node, Panel>} panels
 * @param {Node} node
 * @param {Panel} panel
 */
function keep(panels, node, panel) {
  panels.set(node, panel)
  chain(node, 'onRemoved', () => panels.delete(node))
}

/** Words of ours, once the page's language has changed. */
function translate() {
  for (const panel of [...previews.values(), ...players.values()]) panel.translate()
  askAgain()
}

/** @param {Node} node */
function placeOf(node) {
  return `${rootGraph().id}/${node.graph?.id}/${node.id}`
}

/** @param {CustomEvent<any>} event */
function onPreview({ detail }) {
  const node = nodeOf(detail.node)
  if (!node || !isOn('Preview')) return
  // The host's own sampler shows one too, when our guider drives it.
  if (!previews.has(node)) keep(previews, node, new Preview(node))
  previews.get(node)?.show(detail)
}

/** @param {CustomEvent<any>} event */
function onWarning({ detail }) {
  if (!isOn('Warnings')) return
  const title = nodeOf(detail.node)?.title
  app.extensionManager.toast.add({
    severity: 'warn',
    summary: title ? `${text('warning')}: ${title}` : text('warning'),
    detail: String(detail.text),
    life: WARNING_SECONDS * 1000
  })
}

/**
 * Messages with the host's own names are typed; ours are not.
 * @param {string} name
 * @param {(event: CustomEvent<any>) => void} listener
 */
function listen(name, listener) {
  api.addEventListener(/** @type {any} */ (name), /** @type {any} */ (listener))
}

const commands = [
  { name: 'CopyPrompt', label: 'Copy as API prompt', icon: 'pi pi-copy', write: asPrompt },
  { name: 'CopyCurl', label: 'Copy as curl command', icon: 'pi pi-code', write: asCurl },
  { name: 'CopyPython', label: 'Copy as Python script', icon: 'pi pi-file', write: asPython }
]

/** Menu entries of the canvas; the host has no names in other languages for these. */
function entries() {
  const options = commands.map(({ name, write }) => ({ content: text(name), callback: () => void copyGraph(write) }))
  return [null, { content: text('warning'), has_submenu: true, submenu: { options } }]
}

/**
 * @param {string} name
 * @param {string} label
 * @param {string} tooltip
 */
function setting(name, label, tooltip) {
  const category = ['Mochi Video', 'Nodes', name]
  return { id: /** @type {any} */ (`${PREFIX}.${name}`), name: label, type: /** @type {'boolean'} */ ('boolean'), defaultValue: true, tooltip, category }
}

app.registerExtension({
  name: PREFIX,
  settings: [
    setting('Preview', 'Moving preview while sampling', 'Show the whole clip on the sampler while it is made.'),
    setting('Cost', 'Cost line on size and sampler', 'Show tokens, memory and time under the size.'),
    setting('Player', 'Player on the decode node', 'Play and step through the video on the node that decoded it.'),
    setting('Warnings', 'Warnings as messages', 'Show what the nodes warn of, such as a prompt that was cut.')
  ],
  commands: commands.map(({ name, label, icon, write }) => ({
    id: `${PREFIX}.${name}`,
    label,
    icon,
    function: () => copyGraph(write)
  })),
  menuCommands: [{ path: ['Mochi Video'], commands: commands.map(({ name }) => `${PREFIX}.${name}`) }],
  getCanvasMenuItems: entries,
  getNodeMenuItems: (node) => (String(node.type).startsWith(PREFIX) ? entries() : []),

  init: loadText,

  setup() {
    const style = element('link', { rel: 'stylesheet', href: new URL('./style.css', import.meta.url).href })
    app.canvasEl.parentElement?.append(style)
    listen('mochi_video.preview', onPreview)
    listen('mochi_video.warning', onWarning)
    listen('execution_success', askAgain)
    // The setting has its new value only after this has been told.
    app.ui.settings.addEventListener('Comfy.Locale.change', () => setTimeout(translate))
  },

  nodeCreated(node) {
    panels[String(node.comfyClass ?? node.type)]?.(/** @type {Node} */ (node))
  },

  loadedGraphNode(node) {
    const clips = decoded.get(placeOf(/** @type {Node} */ (node)))
    if (clips) players.get(/** @type {Node} */ (node))?.show(clips)
  }
})
