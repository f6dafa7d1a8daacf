// The clip while it is sampled, moving: the server sends its pictures in one JPEG, and a canvas plays them.

import { addPanel, element } from './panel.js'
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
const HEIGHT = 200

/** The preview of one node. */
export class Preview {
  /** @param {Node} node */
  constructor(node) {
    this.canvas = element('canvas', { role: 'img', hidden: '' })
    this.caption = element('div', { class: 'mochi-video-caption' })
    /** @type {Strip | null} */
    this.strip = null
    this.isSampling = false
    this.sheet = new Image()
    this.sheet.addEventListener('load', () => this.draw())
    this.picture = 0
    /** @type {ReturnType<typeof setInterval> | undefined} */
    this.timer = undefined
    addPanel(node, 'mochi_video_preview', element('div', { class: 'mochi-video-preview' }, this.canvas, this.caption), HEIGHT, true)
    this.translate()
  }

  /** Says what it shows in the page's language. */
  translate() {
    const { strip } = this
    const steps = { step: Number(strip?.step), steps: Number(strip?.steps) }
    const isCut = strip && !this.isSampling && steps.step < steps.steps
    this.caption.textContent = strip ? text(isCut ? 'stopped' : 'step', steps) : text('noPreview')
    this.canvas.setAttribute('aria-label', this.caption.textContent)
  }

  /**
   * Shows the latest pictures; the picture that was on show goes on from where it was.
   * @param {Strip} strip
   */
  show(strip) {
    if (!IMAGE.test(strip.image) || !(strip.count > 0 && strip.columns > 0 && strip.width > 0 && strip.fps > 0)) return
    if (strip.fps !== this.strip?.fps) this.stop()
    this.strip = strip
    this.isSampling = true
    this.sheet.src = strip.image
    this.canvas.hidden = false
    this.translate()
    this.look()
  }

  /** The run is over. */
  end() {
    this.isSampling = false
    if (this.strip) this.translate()
  }

  /** Moves for as long as it is on the page. */
  look() {
    const { strip, canvas } = this
    if (!strip || this.timer || !canvas.isConnected || matchMedia('(prefers-reduced-motion: reduce)').matches) return
    this.timer = setInterval(() => {
      if (!canvas.isConnected) this.stop()
      this.picture += 1
      this.draw()
    }, 1000 / strip.fps)
  }

  stop() {
    clearInterval(this.timer)
    this.timer = undefined
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
