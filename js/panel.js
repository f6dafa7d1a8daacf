// A panel of ours below a node's widgets: a DOM element that both of the host's renderers show, and that no file keeps.

/** @typedef {import('./types/host.js').Node} Node */

const MARGIN = 8

/**
 * Adds `element` to `node` as a widget that neither workflow files nor prompts know of.
 *
 * `height()` is what is in it now, in pixels. Returns what to call after that has changed: the node grows if it must.
 * @param {Node} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {() => number} height
 */
export function addPanel(node, name, element, height) {
  const whole = () => height() + 2 * MARGIN
  element.classList.add('mochi-video-panel')
  const widget = node.addDOMWidget?.(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: whole,
    getMaxHeight: whole,
    getValue: () => '',
    setValue: () => {}
  })
  if (widget) widget.serialize = false
  // One renderer asks the widget, the other looks at the element.
  const keepHeight = () => element.style.setProperty('min-height', `${height()}px`)
  keepHeight()
  return () => {
    keepHeight()
    const [width, least] = node.computeSize()
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least)])
    node.graph?.setDirtyCanvas(true, true)
  }
}

/**
 * Runs `after` when `node` does what `name` says, after whatever else the host or others have there.
 * @param {Node} node
 * @param {'onRemoved' | 'onExecuted'} name
 * @param {(...values: any[]) => void} after
 */
export function chain(node, name, after) {
  /** @type {((...values: any[]) => any) | undefined} */
  const before = node[name]
  node[name] = function (/** @type {any[]} */ ...values) {
    const result = before?.apply(this, values)
    after(...values)
    return result
  }
}

/**
 * A DOM element with attributes and children; text is text, never markup.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string>} [attributes]
 * @param {(Node_ | string)[]} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...children)
  return made
}

/** @typedef {globalThis.Node} Node_ */
