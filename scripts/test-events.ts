import { closeSync, openSync, writeSync } from 'node:fs'
import type { Reporter, TestCase, TestModule } from 'vitest/node'

/** What a test run tells programs, one JSON object a line, see {@link TestEvents}. */
export type TestEvent =
  | { readonly event: 'start'; readonly files: number }
  | { readonly event: 'file'; readonly file: string }
  | { readonly event: 'file-end'; readonly file: string }
  | {
      readonly event: 'test'
      readonly name: string
      readonly state: 'passed' | 'failed' | 'skipped'
      /** How often it failed before that. */
      readonly retries: number
    }
  /** A file that could not be run, or an error outside of any test. */
  | { readonly event: 'error'; readonly message: string }
  | { readonly event: 'end' }

/** A vitest reporter that writes {@link TestEvent}s to the file that NODEVISOR_TEST_EVENTS names. */
export default class TestEvents implements Reporter {
  readonly #fd = openSync(process.env.NODEVISOR_TEST_EVENTS!, 'a')

  onTestRunStart(files: readonly unknown[]): void {
    this.#write({ event: 'start', files: files.length })
  }

  onTestModuleStart(module: TestModule): void {
    this.#write({ event: 'file', file: module.relativeModuleId })
  }

  onTestCaseResult(test: TestCase): void {
    const { state } = test.result()
    if (state === 'pending') return
    const name = `${test.module.relativeModuleId} > ${test.fullName}`
    this.#write({ event: 'test', name, state, retries: test.diagnostic()?.retryCount ?? 0 })
  }

  onTestModuleEnd(module: TestModule): void {
    for (const { message } of module.errors()) {
      this.#write({ event: 'error', message: `${module.relativeModuleId}: ${message}` })
    }
    this.#write({ event: 'file-end', file: module.relativeModuleId })
  }

  onTestRunEnd(_modules: unknown, errors: readonly { readonly message: string }[]): void {
    for (const { message } of errors) this.#write({ event: 'error', message })
    this.#write({ event: 'end' })
    closeSync(this.#fd)
  }

  #write(event: TestEvent): void {
    const bytes = Buffer.from(`${JSON.stringify(event)}\n`)
    for (let written = 0; written < bytes.length; ) written += writeSync(this.#fd, bytes, written)
  }
}
