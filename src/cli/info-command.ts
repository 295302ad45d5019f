import { type HostInfo, inspectHost } from '../index.js'
import { EXIT_STATUS } from './exit-status.js'

const KINDS = {
  hardware: 'KVM on VT-x or AMD-V: all guest code runs natively',
  pvm: 'KVM on PVM (no VT-x or AMD-V): user-mode 64-bit code runs natively, kernel code is emulated, slowly',
  emulated: 'KVM on AMD-V that QEMU emulates: right in everything, native in nothing',
} as const

/** What each kind of host means for those who write guests. */
const ADVICE = {
  hardware: [],
  pvm: [
    'about 2 million kernel-mode instructions a second; SSE, x87, int n and some others are unknown there',
    'paging works in long mode only; features cannot be hidden from the guest’s CPUID',
  ],
  emulated: ['everything takes 10 to 50 times as long as on hardware: use generous time-outs'],
} as const

/** `nodevisor info`: says what this host's KVM is and can do. @returns the exit status */
export function infoCommand(options: { readonly json?: boolean }): number {
  const info = inspectHost()
  process.stdout.write(options.json ? `${JSON.stringify(info)}\n` : describe(info))
  return info.usable ? EXIT_STATUS.ok : EXIT_STATUS.unavailable
}

function describe(info: HostInfo): string {
  const lines: [string, string][] = [
    ['KVM', info.usable ? 'usable' : 'not usable'],
    ...(info.problem === undefined ? [] : ([['problem', info.problem.message]] satisfies [string, string][])),
    ...(info.kind === undefined ? [] : ([['kind', KINDS[info.kind]]] satisfies [string, string][])),
    ...(info.kind === undefined ? [] : ADVICE[info.kind].map((text): [string, string] => ['', text])),
    ['module', info.module ?? 'not visible'],
    ['processor', info.processor],
    ['runs under', info.hypervisor ?? 'no hypervisor, or one that does not say so'],
  ]
  if (info.capabilities !== undefined) {
    const { MAX_VCPUS, NR_VCPUS, NR_MEMSLOTS, ...flags } = info.capabilities
    lines.push(
      ['API version', String(info.apiVersion)],
      ['vCPUs', `up to ${MAX_VCPUS} (recommended: ${NR_VCPUS})`],
      ['memory slots', String(NR_MEMSLOTS)],
      ['has', wrap(Object.entries(flags).filter(([, value]) => value > 0))],
      ['lacks', wrap(Object.entries(flags).filter(([, value]) => value === 0))],
    )
  }
  return lines.map(([name, value]) => `${(name === '' ? '' : `${name}:`).padEnd(INDENT)}${value}\n`).join('')
}

const INDENT = 14
const WIDTH = 100

/** Names of capabilities, as many to a line as fit. */
function wrap(flags: readonly (readonly [string, number])[]): string {
  const lines: string[] = ['']
  for (const [name, value] of flags) {
    const word = value > 1 ? `${name}=${value}` : name
    const line = lines[lines.length - 1]!
    if (line !== '' && line.length + word.length + 1 > WIDTH - INDENT) lines.push(word)
    else lines[lines.length - 1] = line === '' ? word : `${line} ${word}`
  }
  return lines.join(`\n${' '.repeat(INDENT)}`)
}
