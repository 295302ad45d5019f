import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'

/** A folder that is there until the test is over. */
export function makeFolder(): string {
  const path = mkdtempSync(join(tmpdir(), 'nodevisor-test-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}
