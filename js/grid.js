// The sizes that the model can make: multiples of 16 pixels, 6k+1 frames, at 30 frames a second.

export const FRAMES_PER_LATENT = 6
export const PIXELS_PER_PATCH = 16
export const RELEASED_FPS = 30

/**
 * The nearest frame count of the form 6k+1, at least 1; ties go up.
 * @param {number} frames
 */
export function snapFrames(frames) {
  return Math.max(0, Math.floor((frames - 1) / FRAMES_PER_LATENT + 0.5)) * FRAMES_PER_LATENT + 1
}

/**
 * The nearest positive multiple of 16; ties go up.
 * @param {number} pixels
 */
export function snapPixels(pixels) {
  return Math.max(1, Math.floor(pixels / PIXELS_PER_PATCH + 0.5)) * PIXELS_PER_PATCH
}

/**
 * The frame count nearest to `seconds`.
 * @param {number} seconds
 */
export function framesForSeconds(seconds) {
  return snapFrames(seconds * RELEASED_FPS)
}

/**
 * The width and height that a preset's name begins with, or null: it is `custom`.
 * @param {unknown} preset
 */
export function sizeOfPreset(preset) {
  const found = /^(\d+)x(\d+)/.exec(String(preset))
  return found ? { width: Number(found[1]), height: Number(found[2]) } : null
}
