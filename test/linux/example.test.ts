import { it } from 'vitest'
import { HAS_USER_SPACE } from './linux.js'

if (HAS_USER_SPACE) await import('../../examples/linux.test.js')
else it.skip('examples/linux.test.ts', () => undefined)
