/**
 * A Linux to start with: small kernels and a busybox that are made on the spot, for tests and first steps. Making them
 * needs a Debian system; see `docs/linux.md`.
 *
 * @module
 */
export { KERNEL_NAMES, type KernelName } from './kernels.js'
export {
  agentProgram,
  type ReadyMadeLinux,
  type ReadyMadeLinuxOptions,
  readyMadeLinux,
} from './ready-made.js'
