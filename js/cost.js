// A line that says what a size costs on this machine: tokens, memory, time, and whether it fits.

import { api } from '../../scripts/api.js'
import { framesForSeconds, RELEASED_FPS, sizeOfPreset } from './grid.js'
import { originOf, sourceOf, targetOf, valueOf } from './graph.js'
import { addPanel, element } from './panel.js'
import { text } from './text.js'

/** @typedef {import('./types/host.js').Node} Node */
/**
 * What the server answers.
 * @typedef {object} Cost
 * @property {number} tokens
 * @property {'fits' | 'streams' | 'too_large'} verdict
 * @property {string} device
 * @property {number} available_bytes
 * @property {number | null} sampling_bytes
 * @property {number | null} decode_bytes
 * @property {number | null} least_bytes
 * @property {number | null} blocks
 * @property {number | null} resident
 * @property {number | null} seconds_a_step
 * @property {boolean} dit_known
 */

const ROUTE = '/mochi_video/cost'
const HEIGHT = 80
const SECONDS_TO_ASK_AGAIN = 10
const SAMPLERS = ['MochiVideoSampler', 'SamplerCustomAdvanced']
const SCHEDULES = ['MochiVideoSigmas', 'BasicScheduler']

/** The line below one node, a size or a sampler. */
export class CostLine {
  /** @param {Node} node */
  constructor(node) {
    this.node = node
    this.asked = ''
    this.panel = element('div', { class: 'mochi-video-cost', role: 'status' })
    addPanel(node, 'mochi_video_cost', this.panel, HEIGHT)
    this.show()
  }

  /** Asks again at the next look: the server knows better how long things take, or the page has another language. */
  forget() {
    this.asked = ''
  }

  /** Asks the server when what is set has changed. The graph tells nobody of all that may change it. */
  look() {
    const question = this.question()
    const asked = JSON.stringify([question, this.steps()])
    if (asked === this.asked) return
    this.asked = asked
    if (question) void this.ask(question, asked)
    else this.show()
  }

  /** The node that says how large the video is: this one, or what this sampler's latents come from. */
  sizeNode() {
    return this.node.type === 'MochiVideoSize' ? this.node : sourceOf(this.node, 'latent', ['MochiVideoSize'])
  }

  samplerNode() {
    return SAMPLERS.includes(String(this.node.type)) ? this.node : targetOf(this.node, 0, SAMPLERS)
  }

  /** What to ask, or null when a wire decides the size. */
  question() {
    const size = this.sizeNode()
    if (!size) return null
    const [preset, seconds] = [valueOf(size, 'preset'), Number(valueOf(size, 'seconds') ?? 0)]
    const fixed = sizeOfPreset(preset)
    const frames = seconds > 0 ? framesForSeconds(seconds) : valueOf(size, 'frames')
    const numbers = {
      width: fixed?.width ?? valueOf(size, 'width'),
      height: fixed?.height ?? valueOf(size, 'height'),
      frames,
      batch_size: valueOf(size, 'batch_size') ?? 1
    }
    if (preset === undefined || Object.values(numbers).some((value) => value === undefined)) return null
    const loader = this.loaderNode()
    return {
      ...numbers,
      dit_name: (loader && valueOf(loader, 'dit_name')) ?? '',
      memory: (loader && valueOf(loader, 'memory')) ?? 'auto'
    }
  }

  loaderNode() {
    const sampler = this.samplerNode()
    const guided = sampler?.type === 'SamplerCustomAdvanced'
    const start = guided ? sourceOf(sampler, 'guider', ['MochiVideoGuider']) : sampler
    return sourceOf(start, 'model', ['MochiVideoDiTLoader'])
  }

  /** How many steps the sampler will take, as far as widgets say. */
  steps() {
    const sampler = this.samplerNode()
    if (!sampler) return undefined
    const slot = sampler.inputs?.findIndex((input) => input.name === 'sigmas' && input.link != null) ?? -1
    // What lies between a schedule and a sampler may take only a part of it.
    const origin = slot >= 0 ? originOf(sampler, slot) : null
    const isSchedule = SCHEDULES.includes(String(origin?.type))
    const steps = slot < 0 ? valueOf(sampler, 'steps') : origin && isSchedule ? valueOf(origin, 'steps') : undefined
    return steps === undefined ? undefined : Number(steps)
  }

  /**
   * @param {Record<string, unknown>} question
   * @param {string} asked
   */
  async ask(question, asked) {
    const query = new URLSearchParams(Object.entries(question).map(([name, value]) => [name, String(value)]))
    try {
      const answer = await api.fetchApi(`${ROUTE}?${query}`)
      const content = await answer.json()
      if (asked !== this.asked) return
      if (answer.ok) this.show(content, Number(question.frames))
      else this.show(null, 0, String(content.error))
    } catch {
      this.show(null, 0, text('noAnswer'))
      setTimeout(() => this.forget(), SECONDS_TO_ASK_AGAIN * 1000)
    }
  }

  /**
   * @param {Cost | null} [cost]
   * @param {number} [frames]
   * @param {string} [wrong]
   */
  show(cost = null, frames = 0, wrong = '') {
    this.panel.dataset.verdict = cost?.verdict ?? (wrong ? 'too_large' : '')
    const rows = cost ? described(cost, frames, this.steps()) : [wrong || text('sizeUnknown')]
    this.panel.replaceChildren(...rows.map((row) => element('div', {}, row)))
    this.panel.title = rows.join('\n')
  }
}

/**
 * What the line says, row by row.
 * @param {Cost} cost
 * @param {number} frames
 * @param {number | undefined} steps
 */
function described(cost, frames, steps) {
  const seconds = (frames / RELEASED_FPS).toFixed(1)
  const size = [text('frames', { count: frames }), text('seconds', { seconds }), text('tokens', { count: grouped(cost.tokens) })]
  return [size.join(' · '), `${symbols[cost.verdict]} ${verdict(cost)}`, parts(cost), time(cost, steps)].filter(Boolean)
}

const symbols = { fits: '✓', streams: '⇄', too_large: '✕' }

/** @param {Cost} cost */
function verdict(cost) {
  const words = {
    fits: text('fits'),
    streams: text('streams', { resident: cost.resident ?? 0, blocks: cost.blocks ?? 0 }),
    too_large: text('tooLarge', { size: gigabytes(cost.least_bytes ?? cost.sampling_bytes ?? 0) })
  }
  return `${words[cost.verdict]} (${text('of', { size: gigabytes(cost.available_bytes) })})`
}

/**
 * What sampling and decoding take, where they can be done.
 * @param {Cost} cost
 */
function parts(cost) {
  if (cost.sampling_bytes === null || cost.decode_bytes === null) return ''
  const both = [
    text('sampling', { size: gigabytes(cost.sampling_bytes) }),
    text('decode', { size: gigabytes(cost.decode_bytes) })
  ]
  // A CPU's weights lie where they were loaded, and are not counted.
  const said = both.join(', ') + (cost.device === 'cpu' ? ` ${text('besideWeights')}` : '')
  return cost.dit_known ? said : text('released', { parts: said })
}

/**
 * How long it will take, as far as the last run and the widgets tell.
 * @param {Cost} cost
 * @param {number | undefined} steps
 */
function time(cost, steps) {
  if (cost.seconds_a_step === null) return text('noTime')
  if (!steps) return text('aStep', { time: duration(cost.seconds_a_step) })
  return text('time', { time: duration(cost.seconds_a_step * steps), steps })
}

/** @param {number} bytes */
function gigabytes(bytes) {
  return bytes < 1e8 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`
}

/** @param {number} count */
function grouped(count) {
  return count.toLocaleString('en').replaceAll(',', '\u202f')
}

/**
 * Seconds as a person says them: 40 s, 12 min, 1 h 05 min.
 * @param {number} seconds
 */
function duration(seconds) {
  if (seconds < 90) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`
  const minutes = Math.round(seconds / 60)
  if (minutes < 60) return `${minutes} min`
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`
}
