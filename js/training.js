// How a training goes: the curve of its loss, what it makes, how long it takes; and what became of the clips.

import { api } from '../../scripts/api.js'
import { addPanel, element } from './panel.js'
import { text } from './text.js'

/** @typedef {import('./types/host.js').Node} Node */
/**
 * A sample's file, and the step that it was made at.
 * @typedef {object} Sample
 * @property {string} filename
 * @property {string} subfolder
 * @property {string} type
 * @property {number} step
 */
/**
 * All that the server tells of a training, each time it tells of it.
 * @typedef {object} Told
 * @property {'running' | 'stopped' | 'failed' | 'finished'} state
 * @property {number} step
 * @property {number} steps
 * @property {number | null} loss
 * @property {number} rate
 * @property {number} seconds
 * @property {[number, number][]} curve
 * @property {Sample[]} samples
 * @property {string} lora
 */

const SVG = 'http://www.w3.org/2000/svg'
const HEIGHT = 330
const REPORT_HEIGHT = 110
const STATES = ['running', 'stopped', 'failed', 'finished']
// How much of the smoothed line each point is.
const SMOOTHING = 0.12
// The chart's own units; its lines are as thick whatever its size.
const UNITS = 100
const MARGIN = 4

/**
 * What a message says of a training, or null when it says nothing that can be shown.
 * @param {any} told
 * @returns {Told | null}
 */
export function trainingOf(told) {
  if (!STATES.includes(told?.state) || !(told.steps > 0) || !Array.isArray(told.curve) || !Array.isArray(told.samples)) return null
  const curve = told.curve.filter((/** @type {any} */ point) => Array.isArray(point) && point.length === 2 && point.every(Number.isFinite))
  const samples = told.samples.filter((/** @type {any} */ one) => typeof one?.filename === 'string' && typeof one.subfolder === 'string')
  const [loss, seconds] = [told.loss, told.seconds].map((value) => (Number.isFinite(value) ? value : null))
  return { ...told, loss, seconds: seconds ?? 0, curve, samples }
}

/** The training of one node. */
export class Training {
  /** @param {Node} node */
  constructor(node) {
    /** @type {Told | null} */
    this.told = null
    this.raw = line('raw')
    this.smooth = line('smooth')
    this.now = line('now')
    this.chart = document.createElementNS(SVG, 'svg')
    const box = `0 0 ${UNITS} ${UNITS}`
    for (const [name, value] of Object.entries({ viewBox: box, preserveAspectRatio: 'none', role: 'img' })) this.chart.setAttribute(name, value)
    this.chart.append(this.raw, this.smooth, this.now)
    this.top = element('span')
    this.bottom = element('span')
    this.first = element('span')
    this.end = element('span')
    const plot = element('div', { class: 'mochi-video-plot' })
    plot.append(
      element('div', { class: 'mochi-video-axis', 'aria-hidden': 'true' }, this.top, this.bottom),
      this.chart,
      element('div', { class: 'mochi-video-steps', 'aria-hidden': 'true' }, this.first, this.end)
    )
    this.plot = plot
    this.state = element('div', { class: 'mochi-video-caption', role: 'status', 'aria-live': 'polite' })
    this.facts = element('div', { class: 'mochi-video-caption mochi-video-facts' })
    this.video = element('video', { playsinline: '', loop: '', controls: '', hidden: '' })
    this.video.muted = true
    this.which = element('select', { hidden: '' })
    this.which.addEventListener('change', () => this.play())
    // What is typed here is for the list: the canvas would move.
    this.which.addEventListener('keydown', (event) => event.stopPropagation())
    this.samples = element('div', { class: 'mochi-video-samples' }, this.video, this.which)
    this.panel = element('div', { class: 'mochi-video-training', role: 'group' }, plot, this.facts, this.state, this.samples)
    addPanel(node, 'mochi_video_training', this.panel, HEIGHT, true)
    this.translate()
  }

  /**
   * Shows what was told last.
   * @param {Told} told
   */
  show(told) {
    if (told === this.told) return
    this.told = told
    this.draw()
    this.list()
    this.translate()
  }

  draw() {
    const curve = this.told?.curve ?? []
    const losses = curve.map(([, loss]) => loss)
    const [least, most] = [Math.min(...losses), Math.max(...losses)]
    const steps = this.told?.steps ?? 1
    const height = UNITS - 2 * MARGIN
    /** @type {(point: [number, number]) => string} */
    const place = ([step, loss]) => {
      const x = (step / steps) * UNITS
      const y = most > least ? MARGIN + ((most - loss) / (most - least)) * height : UNITS / 2
      return `${x.toFixed(2)},${y.toFixed(2)}`
    }
    const smoothed = smooth(curve)
    this.raw.setAttribute('points', curve.map(place).join(' '))
    this.smooth.setAttribute('points', smoothed.map(place).join(' '))
    const last = curve.at(-1)
    // A line without length, with round ends, is a dot that no stretching of the chart makes an ellipse.
    this.now.setAttribute('points', last ? `${place(last)} ${place(last)}` : '')
    this.chart.dataset.points = String(curve.length)
    this.top.textContent = losses.length ? number(most) : ''
    this.bottom.textContent = losses.length ? number(least) : ''
    this.first.textContent = losses.length ? '0' : ''
    this.end.textContent = losses.length ? String(steps) : ''
  }

  /** The samples there are; the newest is played, unless an older one was chosen. */
  list() {
    const samples = this.told?.samples ?? []
    const chosen = this.which.value
    const wasLast = this.which.selectedIndex === this.which.options.length - 1
    const names = samples.map((sample) => String(sample.step))
    if (names.join() === Array.from(this.which.options, (option) => option.value).join()) return
    this.which.replaceChildren(...names.map((name) => element('option', { value: name })))
    this.which.value = !wasLast && names.includes(chosen) ? chosen : (names.at(-1) ?? '')
    this.which.hidden = names.length < 2
    this.video.hidden = !names.length
    this.play()
  }

  /** Plays the chosen sample. */
  play() {
    const sample = this.told?.samples.find((one) => String(one.step) === this.which.value)
    if (!sample) return
    const query = new URLSearchParams({ filename: sample.filename, subfolder: sample.subfolder, type: 'output' })
    const address = api.apiURL(`/view?${query}`)
    if (this.video.getAttribute('src') === address) return
    this.video.src = address
    this.video.setAttribute('aria-label', text('sampleAt', { step: sample.step }))
    // A browser may refuse to begin by itself; its own controls are there then.
    if (!matchMedia('(prefers-reduced-motion: reduce)').matches) this.video.play().catch(() => {})
  }

  /** Puts all words into the page's language. */
  translate() {
    const { told } = this
    this.panel.setAttribute('aria-label', text('training'))
    this.which.setAttribute('aria-label', text('samples'))
    for (const option of this.which.options) option.textContent = text('sampleAt', { step: option.value })
    this.plot.hidden = !told
    this.facts.hidden = !told
    const counts = { step: told?.step ?? 0, steps: told?.steps ?? 0, lora: told?.lora ?? '' }
    // Said aloud when it changes: not at each step.
    say(this.state, told ? text(key(told.state), counts) : text('noTraining'))
    if (!told) return
    const loss = told.loss === null ? '-' : number(told.loss)
    const facts = [text('step', counts), text('loss', { loss })]
    if (told.seconds) facts.push(text('perStep', { time: duration(told.seconds) }))
    if (told.state === 'running' && told.seconds) facts.push(text('left', { time: duration(told.seconds * (told.steps - told.step)) }))
    this.facts.textContent = facts.join(', ')
    const range = { least: this.bottom.textContent ?? '', most: this.top.textContent ?? '', loss, ...counts }
    this.chart.setAttribute('aria-label', text('curve', range))
  }
}

/** What became of the clips, on the node that prepares them. */
export class Report {
  /** @param {Node} node */
  constructor(node) {
    this.said = ''
    this.lines = element('pre', { class: 'mochi-video-report', tabindex: '0', role: 'status' })
    addPanel(node, 'mochi_video_report', this.lines, REPORT_HEIGHT, true)
    this.translate()
  }

  /** @param {string} said */
  show(said) {
    if (said === this.said) return
    this.said = said
    this.translate()
  }

  /** The report is the server's, in its words. */
  translate() {
    this.lines.setAttribute('aria-label', text('report'))
    say(this.lines, this.said || text('noReport'))
  }
}

/** @param {Told['state']} state */
function key(state) {
  return { running: 'trainingRuns', stopped: 'trainingStopped', failed: 'trainingFailed', finished: 'trainingFinished' }[state]
}

/**
 * Sets words that are read aloud, when they are others.
 * @param {HTMLElement} place
 * @param {string} words
 */
function say(place, words) {
  if (place.textContent !== words) place.textContent = words
}

/** @param {string} name */
function line(name) {
  const made = document.createElementNS(SVG, 'polyline')
  made.setAttribute('class', `mochi-video-line-${name}`)
  made.setAttribute('vector-effect', 'non-scaling-stroke')
  return made
}

/**
 * The curve with less of each point's chance.
 * @param {[number, number][]} curve
 * @returns {[number, number][]}
 */
function smooth(curve) {
  let held = 0
  let weight = 0
  return curve.map(([step, loss]) => {
    held += SMOOTHING * (loss - held)
    // The line begins among the points, not at zero.
    weight += SMOOTHING * (1 - weight)
    return [step, held / weight]
  })
}

/** @param {number} value */
function number(value) {
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toFixed(3)
}

/** @param {number} seconds */
function duration(seconds) {
  if (seconds < 10) return text('seconds', { seconds: seconds.toFixed(seconds < 1 ? 2 : 1) })
  if (seconds < 100) return text('seconds', { seconds: Math.round(seconds) })
  const minutes = Math.round(seconds / 60)
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`
}
