// Names for what the host's published types leave unnamed.

import type { ComfyExtension, DOMWidget, DOMWidgetOptions } from '@comfyorg/comfyui-frontend-types'

type HostNode = Parameters<NonNullable<ComfyExtension['nodeCreated']>>[0]

/** A node of the graph, with what the host's frontend adds to litegraph's. */
export type Node = HostNode & {
  addDOMWidget?<T extends HTMLElement>(
    name: string,
    type: string,
    element: T,
    options: DOMWidgetOptions<string>
  ): DOMWidget<T, string>
  onExecuted?(output: any): void
  subgraph?: HostNode['graph']
}

export type Widget = NonNullable<HostNode['widgets']>[number]
