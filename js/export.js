// The graph as something to paste elsewhere: an API prompt, a curl command, a Python script.

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { element } from './panel.js'
import { text } from './text.js'

/** @typedef {{ output: Record<string, any>, workflow: any }} Queued */

/** @param {Queued} queued */
export function asPrompt(queued) {
  return JSON.stringify(queued.output, null, 2)
}

/**
 * What `/prompt` takes; the files that come of it carry the graph.
 * @param {Queued} queued
 */
function body(queued) {
  return { prompt: queued.output, extra_data: { extra_pnginfo: { workflow: queued.workflow } } }
}

/**
 * The prompt goes through standard input, so that no quote in it means anything to the shell.
 * @param {Queued} queued
 * @param {string} address
 */
export function asCurl(queued, address) {
  return [
    `curl --fail-with-body --header 'Content-Type: application/json' --data-binary @- '${address}/prompt' <<'PROMPT'`,
    JSON.stringify(body(queued)),
    'PROMPT',
    ''
  ].join('\n')
}

/**
 * @param {Queued} queued
 * @param {string} address
 */
export function asPython(queued, address) {
  // The text of a JSON string, so that it is a Python string too: with nothing but ASCII, and no lone quote.
  const literal = JSON.stringify(JSON.stringify(body(queued))).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`
  )
  return `import json
import time
import urllib.error
import urllib.request

HOST = ${JSON.stringify(address)}
BODY = json.loads(
    ${literal}
)


def call(route, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(HOST + route, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


try:
    prompt_id = call("/prompt", BODY)["prompt_id"]
except urllib.error.HTTPError as error:
    raise SystemExit("The host refused the prompt: " + error.read().decode())
print("Queued as", prompt_id)
while prompt_id not in (history := call("/history/" + prompt_id)):
    queue = call("/queue")
    waiting = [entry[1] for entry in queue["queue_running"] + queue["queue_pending"]]
    if prompt_id not in waiting and prompt_id not in call("/history/" + prompt_id):
        raise SystemExit("The prompt is no longer in the queue")
    time.sleep(1)
print(history[prompt_id]["status"]["status_str"])
for node, output in history[prompt_id]["outputs"].items():
    for kind, entries in output.items():
        print(node, kind, entries)
`
}

/**
 * Copies what `write` makes of the graph as it is now.
 * @param {(queued: Queued, address: string) => string} write
 */
export async function copyGraph(write) {
  const content = write(await app.graphToPrompt(), location.origin + api.api_base)
  try {
    await navigator.clipboard.writeText(content)
    app.extensionManager.toast.add({ severity: 'success', summary: text('title'), detail: text('copied'), life: 3000 })
  } catch {
    // No clipboard without https, nor when the user forbids it.
    offer(content)
  }
}

/**
 * A dialog to copy from by hand.
 * @param {string} content
 */
function offer(content) {
  const area = element('textarea', { readonly: '', rows: '16', 'aria-label': text('copyFailed') })
  area.value = content
  const close = element('button', { type: 'button', class: 'mochi-video-button' }, text('close'))
  const dialog = element('dialog', { class: 'mochi-video-dialog' }, element('p', {}, text('copyFailed')), area, close)
  close.addEventListener('click', () => dialog.close())
  dialog.addEventListener('close', () => dialog.remove())
  // What is typed here is not for the canvas.
  dialog.addEventListener('keydown', (event) => event.stopPropagation())
  // Beside the canvas, of which it is a part.
  app.canvasEl.parentElement?.append(dialog)
  dialog.showModal()
  area.select()
}
