// A player for the decoded video: frame by frame, with the keyboard too, and to keep.

import { api } from '../../scripts/api.js'
import { addPanel, element } from './panel.js'
import { text } from './text.js'

/** @typedef {import('./types/host.js').Node} Node */
/**
 * @typedef {object} Clip
 * @property {string} filename
 * @property {string} subfolder
 * @property {string} type
 * @property {number} frames
 * @property {number} fps
 * @property {number} width
 * @property {number} height
 */

const HEIGHT = 280

/**
 * What a player plays: it outlives the player, as a node is made anew when something is undone.
 * @typedef {object} Shown
 * @property {Clip[]} clips
 * @property {number} index
 * @property {number} frame
 * @property {boolean} isPaused
 */

/**
 * What a decode node reported, as far as it can be played.
 * @param {unknown} reported
 * @returns {Shown}
 */
export function shownOf(reported) {
  const clips = Array.isArray(reported) ? reported.filter(isClip) : []
  return { clips, index: 0, frame: 0, isPaused: false }
}

/**
 * @param {any} clip
 * @returns {clip is Clip}
 */
function isClip(clip) {
  const numbers = [clip?.frames, clip?.fps, clip?.width, clip?.height]
  const names = [clip?.filename, clip?.subfolder, clip?.type]
  return numbers.every((value) => value > 0 && Number.isFinite(value)) && names.every((value) => typeof value === 'string')
}

/** The player of one node. */
export class Player {
  /** @param {Node} node */
  constructor(node) {
    /** @type {Shown} */
    this.shown = { clips: [], index: 0, frame: 0, isPaused: false }
    this.video = element('video', { playsinline: '', preload: 'auto', tabindex: '-1' })
    this.video.muted = true
    this.loops = true
    this.first = this.button('firstFrame', 'pi-step-backward', () => this.seek(0))
    this.previous = this.button('previousFrame', 'pi-angle-left', () => this.seek(this.frame - 1))
    this.toggle = this.button('play', 'pi-play', () => this.playOrPause())
    this.next = this.button('nextFrame', 'pi-angle-right', () => this.seek(this.frame + 1))
    this.last = this.button('lastFrame', 'pi-step-forward', () => this.seek(this.count - 1))
    this.repeat = this.button('loop', 'pi-refresh', () => this.setLoop(!this.loops))
    this.download = element('a', { class: 'mochi-video-button', download: '' }, icon('pi-download'))
    this.position = element('input', { type: 'range', min: '0', step: '1', value: '0' })
    this.which = element('select', { hidden: '' })
    this.number = element('output', { class: 'mochi-video-count' })
    const row = element('div', { class: 'mochi-video-row' })
    row.append(this.first, this.previous, this.toggle, this.next, this.last, this.repeat, this.which, this.number)
    row.append(this.download)
    this.controls = element('div', { class: 'mochi-video-controls', hidden: '' }, this.position, row)
    this.empty = element('div', { class: 'mochi-video-caption' })
    this.panel = element('div', { class: 'mochi-video-player', role: 'group', tabindex: '0' })
    this.panel.append(this.video, this.controls, this.empty)
    this.listen()
    addPanel(node, 'mochi_video_player', this.panel, HEIGHT, true)
    this.translate()
    this.setLoop(true)
  }

  get clip() {
    return this.shown.clips[this.shown.index]
  }

  get frame() {
    return this.shown.frame
  }

  get count() {
    return this.clip?.frames ?? 0
  }

  /**
   * @param {string} key
   * @param {string} iconName
   * @param {() => void} action
   */
  button(key, iconName, action) {
    const made = element('button', { type: 'button', class: 'mochi-video-button', 'data-text': key }, icon(iconName))
    made.addEventListener('click', action)
    return made
  }

  listen() {
    const { video, position, which, panel } = this
    position.addEventListener('input', () => this.seek(Number(position.value)))
    which.addEventListener('change', () => this.open(Number(which.value)))
    video.addEventListener('play', () => this.showState())
    video.addEventListener('pause', () => this.showState())
    video.addEventListener('click', () => this.playOrPause())
    video.addEventListener('seeked', () => this.showFrame(video.currentTime))
    this.followFrames()
    panel.addEventListener('keydown', (event) => this.key(event))
  }

  /** Which frame is on show, by the browser's word where it gives it. */
  followFrames() {
    const { video } = this
    if (!('requestVideoFrameCallback' in video)) {
      /** @type {HTMLVideoElement} */ (video).addEventListener('timeupdate', () => this.showFrame(this.video.currentTime))
      return
    }
    const follow = (/** @type {number} */ _, /** @type {{ mediaTime: number }} */ shown) => {
      // Its time is the frame's beginning; ours asks for the middle.
      this.showFrame(shown.mediaTime + 0.5 / (this.clip?.fps ?? 1))
      video.requestVideoFrameCallback(follow)
    }
    video.requestVideoFrameCallback(follow)
  }

  /**
   * Plays clips, from where another player of them was left.
   * @param {Shown} shown
   */
  show(shown) {
    if (shown === this.shown || !shown.clips.length) return
    this.shown = shown
    this.controls.hidden = false
    this.empty.hidden = true
    this.which.hidden = shown.clips.length < 2
    const names = shown.clips.map((_, index) => element('option', { value: `${index}` }, `${index + 1}`))
    this.which.replaceChildren(...names)
    const { frame, isPaused } = shown
    this.open(shown.index)
    if (isPaused) this.seek(frame)
  }

  /** @param {number} index */
  open(index) {
    this.shown.index = index
    const { clip } = this
    const query = new URLSearchParams({ filename: clip.filename, subfolder: clip.subfolder, type: clip.type })
    const address = api.apiURL(`/view?${query}`)
    this.video.src = address
    this.download.href = address
    this.position.max = String(clip.frames - 1)
    this.which.value = String(index)
    this.showFrame(0)
    if (!matchMedia('(prefers-reduced-motion: reduce)').matches) this.play()
  }

  play() {
    this.shown.isPaused = false
    this.video.loop = this.loops
    // A browser may refuse to begin by itself; the button is there then.
    this.video.play().catch(() => this.showState())
  }

  playOrPause() {
    if (!this.clip) return
    if (this.video.paused) return this.play()
    this.shown.isPaused = true
    this.video.pause()
  }

  /**
   * Stops at a frame: the nearest there is.
   * @param {number} frame
   */
  seek(frame) {
    if (!this.clip) return
    this.video.pause()
    // A video that loops goes on to the first frame when it is set to the last.
    this.video.loop = false
    this.shown.frame = this.clamped(frame)
    this.shown.isPaused = true
    this.video.currentTime = (this.frame + 0.5) / this.clip.fps
    this.showNumber()
  }

  /**
   * The nearest frame that there is.
   * @param {number} frame
   */
  clamped(frame) {
    return Math.min(this.count - 1, Math.max(0, frame))
  }

  /** @param {boolean} loops */
  setLoop(loops) {
    this.loops = loops
    this.video.loop = loops && !this.video.paused
    this.repeat.setAttribute('aria-pressed', String(loops))
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.clip) return
    const target = event.target instanceof HTMLElement ? event.target : null
    // A list is gone through with these keys.
    if (target?.matches('select')) return event.stopPropagation()
    const onControl = target?.matches('button, a')
    /** @type {Record<string, () => void>} */
    const actions = {
      ArrowLeft: () => this.seek(this.frame - 1),
      ArrowRight: () => this.seek(this.frame + 1),
      ',': () => this.seek(this.frame - 1),
      '.': () => this.seek(this.frame + 1),
      Home: () => this.seek(0),
      End: () => this.seek(this.count - 1),
      k: () => this.playOrPause(),
      l: () => this.setLoop(!this.loops)
    }
    // A focused button has its own meaning for the space bar.
    if (!onControl) actions[' '] = () => this.playOrPause()
    const action = actions[event.key]
    // What is typed here is for the player: the canvas would move, or delete the node.
    event.stopPropagation()
    if (!action) return
    event.preventDefault()
    action()
  }

  /** @param {number} seconds */
  showFrame(seconds) {
    if (!this.clip) return
    this.shown.frame = this.clamped(Math.floor(seconds * this.clip.fps + 1e-3))
    this.showNumber()
  }

  showNumber() {
    const said = text('frameOf', { frame: this.frame + 1, count: this.count })
    this.position.value = String(this.frame)
    this.position.setAttribute('aria-valuetext', said)
    this.number.textContent = said
  }

  showState() {
    const key = this.video.paused ? 'play' : 'pause'
    this.toggle.dataset.text = key
    this.toggle.replaceChildren(icon(`pi-${key}`))
    this.label(this.toggle, key)
  }

  /** Puts all words into the page's language. */
  translate() {
    this.panel.querySelectorAll('button').forEach((made) => this.label(made, made.dataset.text ?? ''))
    this.label(this.download, 'download')
    this.position.setAttribute('aria-label', text('position'))
    this.which.setAttribute('aria-label', text('clip'))
    this.panel.setAttribute('aria-label', text('player'))
    this.empty.textContent = text('noVideo')
    if (this.clip) this.showNumber()
  }

  /**
   * @param {HTMLElement} control
   * @param {string} key
   */
  label(control, key) {
    control.setAttribute('aria-label', text(key))
    control.title = text(key)
  }
}

/** @param {string} name */
function icon(name) {
  return element('i', { class: `pi ${name}`, 'aria-hidden': 'true' })
}
