// Our words in the page's language: those of locales/<language>/main.json, which the host hands to its page.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

/** @type {Record<string, { mochiVideo?: Record<string, string> }>} */
let languages = {}

/** Reads the words once; `text` knows them from then on. */
export async function loadText() {
  const answer = await api.fetchApi('/i18n')
  if (answer.ok) languages = await answer.json()
}

/**
 * The words called `key`, with each `{name}` replaced.
 * @param {string} key
 * @param {Record<string, string | number>} [values]
 */
export function text(key, values = {}) {
  const language = String(app.extensionManager.setting.get('Comfy.Locale') ?? 'en')
  const wanted = [language, language.split('-')[0], 'en']
  const found = wanted.map((one) => languages[one]?.mochiVideo?.[key]).find((words) => words !== undefined)
  // Without any words the values are still worth reading.
  if (found === undefined) return [key, ...Object.values(values)].join(' ')
  return found.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole))
}
