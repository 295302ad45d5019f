/** The example guests as the tests use them, and what the tests have to know of the host. */

import { inspectHost } from '../../src/index.js'

export * from '../../guests/expected.js'

/** What the host's KVM is: some tests can only run on some kinds. */
export const HOST_KIND = inspectHost().kind
/** All code at CPL 0 is emulated, by an emulator that lacks instructions. */
export const onPvm = HOST_KIND === 'pvm'
/** The host's own processor is emulated, and slow. */
export const onEmulated = HOST_KIND === 'emulated'

/** How often to repeat something: a tenth of it where all is slow. */
export function times(count: number): number {
  return onEmulated ? Math.ceil(count / 10) : count
}
