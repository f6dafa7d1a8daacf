// Finding things in a graph: nodes by what the server calls them, widgets by name, what a wire leads to.

import { app } from '../../scripts/app.js'

/** @typedef {import('./types/host.js').Node} Node */
/** @typedef {import('./types/host.js').Widget} Widget */

// Wires are followed no further than this: a graph that a file made circular has no end.
const LONGEST_WAY = 50
// What a link within a subgraph says of itself when it comes from outside.
const SUBGRAPH_INPUT = -10

/** The graph of the whole workflow, also on hosts that know it by its old name. */
export function rootGraph() {
  return app.rootGraph ?? app.graph
}

/**
 * Every node of the workflow on show, those in subgraphs too.
 * @param {any} [graph]
 * @param {Set<any>} [seen]
 * @returns {Generator<Node>}
 */
export function* allNodes(graph = rootGraph(), seen = new Set()) {
  if (seen.has(graph)) return
  seen.add(graph)
  for (const node of graph.nodes ?? graph._nodes) {
    yield node
    if (node.subgraph) yield* allNodes(node.subgraph, seen)
  }
}

/**
 * The node that the server calls `id`: within subgraphs that is a path such as `12:5`.
 * @param {string | number} id
 * @returns {Node | null}
 */
export function nodeOf(id) {
  /** @type {any} */
  let graph = rootGraph()
  /** @type {Node | null} */
  let node = null
  for (const part of String(id).split(':')) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part) ?? null
    graph = node?.subgraph
  }
  return node
}

/**
 * @param {Node} node
 * @param {string} name
 * @returns {Widget | undefined}
 */
export function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name)
}

/**
 * What a widget says, or undefined when a wire says it.
 * @param {Node} node
 * @param {string} name
 */
export function valueOf(node, name) {
  const linked = node.inputs?.some((input) => input.name === name && input.link != null)
  return linked ? undefined : widgetOf(node, name)?.value
}

/**
 * The node of one of `types` that the input called `name` gets its value from, through nodes that pass it on.
 * @param {Node | null} node
 * @param {string} name
 * @param {string[]} types
 * @returns {Node | null}
 */
export function sourceOf(node, name, types) {
  for (let step = 0; node && step < LONGEST_WAY; step++) {
    const index = node.inputs?.findIndex((input) => input.name === name) ?? -1
    // What passes a value on without naming it so, such as a reroute, has one input.
    const slot = index >= 0 ? index : step > 0 && node.inputs?.length === 1 ? 0 : -1
    node = slot >= 0 ? originOf(node, slot) : null
    if (node && types.includes(String(node.type))) return node
  }
  return null
}

/**
 * The node that an input's value is made by, in whichever subgraph that is.
 * @param {Node} node
 * @param {number} slot
 * @returns {Node | null}
 */
export function originOf(node, slot) {
  /** @type {any} */
  let graph = node.graph
  let id = node.inputs[slot].link
  for (let step = 0; graph && id != null && step < LONGEST_WAY; step++) {
    const link = graph.getLink(id)
    if (!link) return null
    if (link.origin_id === SUBGRAPH_INPUT) {
      const holder = holderOf(graph)
      id = holder?.inputs[link.origin_slot]?.link ?? null
      graph = holder?.graph
      continue
    }
    const source = graph.getNodeById(link.origin_id)
    if (!source?.subgraph) return source ?? null
    id = source.subgraph.outputs[link.origin_slot]?.linkIds[0]
    graph = source.subgraph
  }
  return null
}

/**
 * A node that stands for `subgraph`.
 * @param {any} subgraph
 * @returns {Node | null}
 */
function holderOf(subgraph) {
  for (const node of allNodes()) if (node.subgraph === subgraph) return node
  return null
}

/**
 * What the server calls a node.
 * @param {Node} node
 * @returns {string}
 */
export function idOf(node) {
  const holder = node.graph === rootGraph() ? null : holderOf(node.graph)
  return holder ? `${idOf(holder)}:${node.id}` : String(node.id)
}

/**
 * The first node of one of `types` that an output of `node` leads to, through whatever lies between.
 * @param {Node} node
 * @param {number} slot
 * @param {string[]} types
 * @returns {Node | null}
 */
export function targetOf(node, slot, types) {
  let reached = node.getOutputNodes(slot) ?? []
  const seen = new Set()
  for (let step = 0; reached.length && step < LONGEST_WAY; step++) {
    const found = reached.find((one) => types.includes(String(one.type)))
    if (found) return found
    reached.forEach((one) => seen.add(one))
    const further = reached.flatMap((one) => (one.outputs ?? []).flatMap((_, index) => one.getOutputNodes(index) ?? []))
    reached = [...new Set(further)].filter((one) => !seen.has(one))
  }
  return null
}
