// Mochi Video in the page: panels below our nodes, messages, menu entries. What each does is in its own file.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { CostLine } from './cost.js'
import { asCurl, asPrompt, asPython, copyGraph } from './export.js'
import { allNodes, idOf, nodeOf, sourceOf } from './graph.js'
import { element } from './panel.js'
import { Player, shownOf } from './player.js'
import { Preview } from './preview.js'
import { keepToGrid } from './size.js'
import { loadText, text } from './text.js'
import { Report, Training, trainingOf } from './training.js'

/** @typedef {import('./types/host.js').Node} Node */
/** @typedef {import('./player.js').Shown} Shown */
/** @typedef {import('./training.js').Told} Told */

const WARNING_SECONDS = 12
const SECONDS_BETWEEN_LOOKS = 0.5
const PREFIX = 'MochiVideo'
// Under this name a decode node reports what it has written for the player.
const PLAYED = 'mochi_video'
// The same of a training, and of the clips that were prepared for one.
const TRAINED = 'mochi_video_training'
const PREPARED = 'text'
const PREPARES = 'MochiVideoPrepareDataset'

/**
 * The panels of a node, for as long as there is the node.
 * @type {WeakMap<Node, { cost?: CostLine, preview?: Preview, player?: Player, training?: Training, report?: Report }>}
 */
const panels = new WeakMap()
/**
 * The workflow that each prompt was queued from: another may be on show when the host tells of it.
 * @type {Map<string, object | null>}
 */
const owners = new Map()
/**
 * What each workflow has made, by node: a node is made anew when something is undone or another workflow was on show.
 * @typedef {{ clips?: Shown, told?: Told, report?: string }} Made
 * @type {WeakMap<object, Map<string, Made>>}
 */
const results = new WeakMap()

/** @param {string} name */
const isOn = (name) => app.extensionManager.setting.get(`${PREFIX}.${name}`) !== false

/** @type {Record<string, (node: Node) => void>} */
const made = {
  MochiVideoSize(node) {
    keepToGrid(node)
    if (isOn('Cost')) panels.set(node, { cost: new CostLine(node) })
  },
  MochiVideoSampler(node) {
    const cost = isOn('Cost') ? new CostLine(node) : undefined
    panels.set(node, { cost, preview: isOn('Preview') ? new Preview(node) : undefined })
  },
  MochiVideoGuider(node) {
    if (isOn('Preview')) panels.set(node, { preview: new Preview(node) })
  },
  MochiVideoDecode(node) {
    if (isOn('Player')) panels.set(node, { player: new Player(node) })
  },
  MochiVideoPrepareDataset(node) {
    if (isOn('Training')) panels.set(node, { report: new Report(node) })
  },
  MochiVideoTrainLora(node) {
    if (isOn('Training')) panels.set(node, { training: new Training(node) })
  }
}

/** @returns {object | null} */
function workflowOnShow() {
  return app.extensionManager.workflow?.activeWorkflow ?? null
}

/**
 * The workflow that a prompt belongs to; of a prompt that something else queued, the one on show.
 * @param {string} prompt
 */
function ownerOf(prompt) {
  return owners.get(prompt) ?? workflowOnShow()
}

/**
 * Workflows that have queued a prompt which has not begun, in their order; and how many prompts began before the page
 * knew that they were queued. The host names a prompt only when it begins.
 * @type {(object | null)[]}
 */
const waiting = []
let early = 0

/** @param {CustomEvent<any>} event */
function onQueued({ detail }) {
  for (let count = Number(detail?.batchCount ?? 1); count > 0; count--) {
    if (early) early -= 1
    else waiting.push(workflowOnShow())
  }
}

/** @param {CustomEvent<any>} event */
function onStart({ detail }) {
  if (!waiting.length) early += 1
  owners.set(detail.prompt_id, waiting.length ? (waiting.shift() ?? null) : workflowOnShow())
}

/** @param {CustomEvent<any>} event */
function onStatus({ detail }) {
  if (detail?.exec_info?.queue_remaining !== 0) return
  // Prompts that were refused or taken out of the queue never begin.
  waiting.length = 0
  early = 0
}

/**
 * The node of a message, when its workflow is on show.
 * @param {{ node: string, prompt_id: string }} message
 */
function nodeOnShow(message) {
  return ownerOf(message.prompt_id) === workflowOnShow() ? nodeOf(message.node) : null
}

/** @param {CustomEvent<any>} event */
function onPreview({ detail }) {
  const node = nodeOnShow(detail)
  // The host's own sampler has no panel of ours; the guider that it samples with has.
  const preview = node && (panels.get(node) ?? panels.get(sourceOf(node, 'guider', ['MochiVideoGuider']) ?? node))?.preview
  preview?.show(detail)
}

/**
 * Keeps what a node made for as long as there is its workflow, and shows it.
 * @param {{ node: string | number, prompt_id: string }} message
 * @param {Made} made
 */
function keep(message, made) {
  const owner = ownerOf(message.prompt_id)
  if (!owner) return
  const ofOwner = results.get(owner) ?? new Map()
  results.set(owner, ofOwner.set(String(message.node), made))
  look()
}

/** @param {CustomEvent<any>} event */
function onExecuted({ detail }) {
  const clips = shownOf(detail.output?.[PLAYED])
  const told = trainingOf(detail.output?.[TRAINED]?.[0])
  const report = detail.output?.[PREPARED]?.[0]
  if (clips.clips.length) keep(detail, { clips })
  else if (told) keep(detail, { told })
  else if (typeof report === 'string' && nodeOnShow(detail)?.type === PREPARES) keep(detail, { report })
}

/** @param {CustomEvent<any>} event */
function onTraining({ detail }) {
  const told = trainingOf(detail)
  if (told) keep(detail, { told })
}

/** @param {CustomEvent<any>} event */
function onWarning({ detail }) {
  if (!isOn('Warnings')) return
  const title = nodeOnShow(detail)?.title
  app.extensionManager.toast.add({
    severity: 'warn',
    summary: title ? `${text('title')}: ${title}` : text('title'),
    detail: String(detail.text),
    life: WARNING_SECONDS * 1000
  })
}

/** @param {CustomEvent<any>} event */
function onEnd({ detail }) {
  owners.delete(detail.prompt_id)
  for (const node of allNodes()) {
    panels.get(node)?.preview?.end()
    panels.get(node)?.cost?.forget()
  }
}

/** Brings every panel up to date. The graph tells nobody of all that may change it: wires, subgraphs, other workflows. */
function look() {
  const workflow = workflowOnShow()
  const made = workflow ? results.get(workflow) : undefined
  for (const node of allNodes()) {
    const { cost, preview, player, training, report } = panels.get(node) ?? {}
    cost?.look()
    preview?.look()
    const shown = made?.get(idOf(node))
    if (shown?.clips) player?.show(shown.clips)
    if (shown?.told) training?.show(shown.told)
    if (shown?.report) report?.show(shown.report)
  }
}

/** Words of ours, once the page has another language. */
function translate() {
  for (const node of allNodes()) {
    const { cost, preview, player, training, report } = panels.get(node) ?? {}
    cost?.forget()
    preview?.translate()
    player?.translate()
    training?.translate()
    report?.translate()
  }
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
  return [null, { content: text('title'), has_submenu: true, submenu: { options } }]
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
    setting('Training', 'Panels on the training nodes', 'Show the curve of the loss, samples and what became of the clips.'),
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

  setup() {
    const style = element('link', { rel: 'stylesheet', href: new URL('./style.css', import.meta.url).href })
    app.canvasEl.parentElement?.append(style)
    listen('promptQueued', onQueued)
    listen('execution_start', onStart)
    listen('status', onStatus)
    listen('mochi_video.preview', onPreview)
    listen('mochi_video.warning', onWarning)
    listen('mochi_video.training', onTraining)
    listen('executed', onExecuted)
    for (const name of ['execution_success', 'execution_error', 'execution_interrupted']) listen(name, onEnd)
    // The setting has its new value only after this has been told.
    app.ui.settings.addEventListener('Comfy.Locale.change', () => setTimeout(translate))
    // The page need not wait for our words.
    loadText().then(translate, () => {})
    setInterval(look, SECONDS_BETWEEN_LOOKS * 1000)
  },

  nodeCreated(node) {
    made[String(node.comfyClass ?? node.type)]?.(/** @type {Node} */ (node))
  }
})
