// `npm start`: boots every example guest, shows what it printed, and a table of how it went. Uses the package as
// its users do.
import Table from 'cli-table3'
import { type Device, inspectHost, type RunResult, VirtualMachine } from 'nodevisor'
import { type ExpectedGuest, expectedGuests, optionsFor } from '../guests/expected.js'

/** A guest that ends by itself takes milliseconds; an emulated host needs a hundred times as long. */
const TIME_LIMIT = 30_000

/** A port that answers what the guest's expected.json says, and remembers what was written to it. */
class Scripted implements Device {
  readonly name = 'scripted'
  readonly ports
  readonly written: number[] = []
  readonly #answers: number[]

  constructor({ port, reads }: NonNullable<ExpectedGuest['device']>) {
    this.ports = { base: port, length: 1 }
    this.#answers = [...reads]
  }

  read(): number {
    return this.#answers.shift() ?? 0
  }

  write(_offset: number, value: number): void {
    this.written.push(value)
  }
}

interface Played {
  readonly result: RunResult
  readonly serial: string
  readonly screen: string
  /** What is not as expected.json says. */
  readonly wrong: readonly string[]
}

async function play(guest: ExpectedGuest): Promise<Played> {
  const device = guest.device === undefined ? undefined : new Scripted(guest.device)
  const vm = await VirtualMachine.create({
    ...optionsFor(guest),
    devices: device === undefined ? [] : [device],
  })
  try {
    if (guest.input !== undefined) vm.serial.write(guest.input)
    const run = vm.run({ timeout: TIME_LIMIT })
    // A guest without an end is stopped once it has said what it has to say.
    if (guest.result.reason === 'stopped') {
      await vm.serial.waitFor(guest.serial ?? '')
      vm.stop()
    }
    const result = await run
    const serial = vm.serial.output
    const screen = vm.screen.text()
    return { result, serial, screen, wrong: differences(guest, result, serial, screen, device) }
  } finally {
    await vm.close()
  }
}

function differences(
  guest: ExpectedGuest,
  result: RunResult,
  serial: string,
  screen: string,
  device: Scripted | undefined,
): string[] {
  const code = result.reason === 'debug-exit' ? result.code : undefined
  const checks: [string, boolean][] = [
    ['result', result.reason === guest.result.reason && code === guest.result.code],
    [
      'serial output',
      guest.serialPattern === undefined ? serial === (guest.serial ?? '') : matches(guest, serial),
    ],
    ['screen', guest.screen === undefined || screen === guest.screen.join('\n').trimEnd()],
    ['device writes', String(device?.written ?? []) === String(guest.device?.writes ?? [])],
  ]
  return checks.filter(([, right]) => !right).map(([what]) => what)
}

function matches(guest: ExpectedGuest, serial: string): boolean {
  return new RegExp(`^(?:${guest.serialPattern})$`).test(serial)
}

function describeResult(result: RunResult): string {
  return result.reason === 'debug-exit' ? `debug-exit ${result.code}` : result.reason
}

async function main(): Promise<number> {
  const host = inspectHost()
  if (!host.usable) {
    console.error(`KVM is not available here: ${host.problem?.message}`)
    return 69
  }
  const table = new Table({
    head: ['guest', 'mode', 'first output', 'exits', 'took', 'result'],
    colAligns: ['left', 'left', 'right', 'right', 'right', 'left'],
    style: { head: [], border: [] },
  })
  let failures = 0
  for (const { name, expected: guest } of expectedGuests()) {
    const { result, serial, screen, wrong } = await play(guest)
    console.log(`── ${name}`)
    const shown = [serial, screen].filter((text) => text !== '').join('\n')
    if (shown !== '') console.log(shown.replace(/^\n+/, '').trimEnd())
    const { exits, durationMs, firstOutputMs } = result
    table.push([
      name,
      guest.mode,
      firstOutputMs === undefined ? '–' : `${firstOutputMs.toFixed(1)} ms`,
      exits.io + exits.mmio + exits.hlt + exits.shutdown + exits.other,
      `${durationMs.toFixed(1)} ms`,
      wrong.length === 0 ? describeResult(result) : `${describeResult(result)}: WRONG ${wrong.join(', ')}`,
    ])
    if (wrong.length > 0) failures++
  }
  console.log(`\n${table}`)
  if (failures > 0) console.error(`${failures} guests did not do what their expected.json says.`)
  return failures === 0 ? 0 : 1
}

process.exitCode = await main()
