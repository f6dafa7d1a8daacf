// The size node's widgets keep to what the model can make, while they are edited.

import { sizeOfPreset, snapFrames, snapPixels } from './grid.js'
import { widgetOf } from './graph.js'

/** @typedef {import('./types/host.js').Node} Node */

const CUSTOM = 'custom'

/** @param {Node} node */
export function keepToGrid(node) {
  after(node, 'frames', (widget) => {
    set(widget, snapFrames(Number(widget.value)))
    // Whoever edits frames means frames.
    set(widgetOf(node, 'seconds'), 0)
  })
  after(node, 'preset', (widget) => {
    const size = sizeOfPreset(widget.value)
    if (!size) return
    set(widgetOf(node, 'width'), size.width)
    set(widgetOf(node, 'height'), size.height)
  })
  for (const name of ['width', 'height']) {
    after(node, name, (widget) => {
      set(widget, snapPixels(Number(widget.value)))
      const preset = widgetOf(node, 'preset')
      const fixed = /** @type {Record<string, number> | null} */ (sizeOfPreset(preset?.value))
      // An own size is what somebody who edits it means.
      if (fixed && fixed[name] !== widget.value) set(preset, CUSTOM)
    })
  }
}

/** @typedef {import('./types/host.js').Widget} Widget */

/**
 * Runs `action` after the user has changed a widget.
 * @param {Node} node
 * @param {string} name
 * @param {(widget: Widget) => void} action
 */
function after(node, name, action) {
  const widget = widgetOf(node, name)
  if (!widget) return
  const before = widget.callback
  widget.callback = function (...values) {
    const result = before?.apply(this, values)
    action(widget)
    // The host's own rounding may have changed it too.
    if (!Object.is(widget.value, values[0])) tell(widget)
    return result
  }
}

/**
 * @param {Widget | undefined} widget
 * @param {number | string} value
 */
function set(widget, value) {
  if (!widget || Object.is(widget.value, value)) return
  widget.value = value
  tell(widget)
}

/**
 * One of the host's renderers shows what callbacks were told last, and it is still telling the value that was typed.
 * @param {Widget} widget
 */
function tell(widget) {
  setTimeout(() => widget.callback?.(widget.value))
}
