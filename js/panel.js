// A panel of ours below a node's widgets: a DOM element that both of the host's renderers show, and that no file keeps.

/** @typedef {import('./types/host.js').Node} Node */

const MARGIN = 8

/**
 * Adds `element` to `node` as a widget that neither workflow files nor prompts know of.
 *
 * It is `height` pixels high from the beginning, whatever is in it: a node that grew while it runs would be a change of the
 * workflow, to be undone. With `grows` it takes what room the node has besides.
 * @param {Node} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {number} height
 * @param {boolean} [grows]
 */
export function addPanel(node, name, element, height, grows = false) {
  const whole = height + 2 * MARGIN
  element.classList.add('mochi-video-panel')
  // One renderer asks the widget, the other looks at the element.
  element.style.minHeight = `${height}px`
  const widget = node.addDOMWidget?.(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => whole,
    ...(grows ? {} : { getMaxHeight: () => whole }),
    getValue: () => '',
    setValue: () => {}
  })
  if (widget) widget.serialize = false
}

/**
 * A DOM element with attributes and children; text is text, never markup.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string>} [attributes]
 * @param {(globalThis.Node | string)[]} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...children)
  return made
}
