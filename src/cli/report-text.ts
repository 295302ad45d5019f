import type { ExitRecord, RunReport, VcpuReport } from '../index.js'

const REGISTERS_PER_LINE = 4
const EXITS_SHOWN = 16

/** A report as lines of text, for people. */
export function reportText(report: RunReport): string {
  const exits = report.lastExits.slice(-EXITS_SHOWN)
  const lines = report.vcpus.flatMap(vcpuLines)
  if (exits.length > 0) lines.push('last exits:', ...exits.map((exit) => `  ${exitText(exit)}`))
  return lines.map((line) => `${line}\n`).join('')
}

function vcpuLines(cpu: VcpuReport): string[] {
  const { registers, specialRegisters: special, exception } = cpu
  const heading = [`vCPU ${cpu.vcpu}: ${cpu.state}, ${cpu.mode} mode`]
  if (exception !== undefined) {
    const name = exception.name ?? `vector ${exception.vector}`
    const code = exception.errorCode === undefined ? '' : ` (error code ${hex(exception.errorCode)})`
    heading.push(`taking ${name}${code}`)
  }
  if (cpu.wasReset) heading.push('reset by KVM since')
  const { cs, ss, gdt, idt } = special
  return [
    heading.join(', '),
    ...table(Object.entries(registers)),
    ...table([
      ['cr0', special.cr0],
      ['cr2', special.cr2],
      ['cr3', special.cr3],
      ['cr4', special.cr4],
      ['efer', special.efer],
    ]),
    `  cs ${hex(cs.selector)} (base ${hex(cs.base)}), ss ${hex(ss.selector)}, ` +
      `gdt ${hex(gdt.base)}+${hex(gdt.limit)}, idt ${hex(idt.base)}+${hex(idt.limit)}`,
    ...(special.idt.limit === 0 ? ['  the IDT is empty: no exception or interrupt can be taken'] : []),
    `  code at rip: ${
      Buffer.from(cpu.code)
        .toString('hex')
        .replace(/(..)(?=.)/g, '$1 ') || 'nothing is mapped'
    }`,
  ]
}

function table(registers: readonly (readonly [name: string, value: bigint])[]): string[] {
  const cells = registers.map(
    ([name, value]) => `${name.padStart(6)} ${value.toString(16).padStart(16, '0')}`,
  )
  return Array.from({ length: Math.ceil(cells.length / REGISTERS_PER_LINE) }, (_, i) =>
    cells.slice(i * REGISTERS_PER_LINE, (i + 1) * REGISTERS_PER_LINE).join(' '),
  )
}

function exitText({ vcpu, kind, direction, address, size, value }: ExitRecord): string {
  if (address === undefined || size === undefined || value === undefined) return `vCPU ${vcpu}: ${kind}`
  const what = kind === 'io' ? `${direction} port` : `${direction} memory`
  const digits = value.toString(16).padStart(2 * Math.min(size, 4), '0')
  return `vCPU ${vcpu}: ${what} ${hex(address)}, ${size} byte${size === 1 ? '' : 's'}: 0x${digits}`
}

function hex(value: number | bigint): string {
  return `0x${value.toString(16)}`
}
