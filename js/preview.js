// The clip while it is sampled, moving: the server sends its pictures in one JPEG, and a canvas plays them.

import { addPanel, chain, element } from './panel.js'
import { text } from './text.js'

/** @typedef {import('./types/host.js').Node} Node */
/**
 * @typedef {object} Strip
 * @property {string} image
 * @property {number} count
 * @property {number} columns
 * @property {number} width
 * @property {number} height
 * @property {number} fps
 * @property {number} step
 * @property {number} steps
 */

const IMAGE = /^data:image\/jpeg;base64,[A-Za-z0-9+/=]+$/
const EMPTY_HEIGHT = 26
const HEIGHT = 220

/** The preview of one node. */
export class Preview {
  /** @param {Node} node */
  constructor(node) {
    this.node = node
    this.canvas = element('canvas', { role: 'img', hidden: '' })
    this.caption = element('div', { class: 'mochi-video-caption', role: 'status' })
    this.panel = element('div', { class: 'mochi-video-preview' }, this.canvas, this.caption)
    /** @type {Strip | null} */
    this.strip = null
    this.sheet = new Image()
    this.sheet.addEventListener('load', () => this.draw())
    this.picture = 0
    /** @type {ReturnType<typeof setInterval> | undefined} */
    this.timer = undefined
    this.fit = addPanel(node, 'mochi_video_preview', this.panel, () => (this.strip ? HEIGHT : EMPTY_HEIGHT))
    chain(node, 'onRemoved', () => this.stop())
    this.translate()
  }

  /** Says what it shows in the page's language. */
  translate() {
    const { strip } = this
    this.caption.textContent = strip
      ? text('step', { step: Number(strip.step), steps: Number(strip.steps) })
      : text('noPreview')
    this.canvas.setAttribute('aria-label', this.caption.textContent)
  }

  /**
   * Shows the latest pictures; the picture that was on show goes on from where it was.
   * @param {Strip} strip
   */
  show(strip) {
    if (!IMAGE.test(strip.image) || !(strip.count > 0 && strip.columns > 0 && strip.width > 0 && strip.fps > 0)) return
    const isFirst = this.strip === null
    const hasNewPace = strip.fps !== this.strip?.fps
    this.strip = strip
    this.sheet.src = strip.image
    this.canvas.hidden = false
    this.translate()
    if (isFirst) this.fit()
    if (hasNewPace) this.start(strip.fps)
  }

  /** @param {number} fps */
  start(fps) {
    this.stop()
    if (matchMedia('(prefers-reduced-motion: reduce)').matches) return
    this.timer = setInterval(() => {
      this.picture += 1
      this.draw()
    }, 1000 / fps)
  }

  stop() {
    clearInterval(this.timer)
  }

  draw() {
    const { strip, canvas, sheet } = this
    const context = canvas.getContext('2d')
    if (!strip || !context || !sheet.complete || !sheet.naturalWidth) return
    const index = this.picture % strip.count
    const [left, top] = [(index % strip.columns) * strip.width, Math.floor(index / strip.columns) * strip.height]
    if (canvas.width !== strip.width || canvas.height !== strip.height) {
      canvas.width = strip.width
      canvas.height = strip.height
    }
    context.drawImage(sheet, left, top, strip.width, strip.height, 0, 0, strip.width, strip.height)
    canvas.dataset.picture = String(index)
  }
}
