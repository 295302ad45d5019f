import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'

setFlagsFromString('--expose-gc')

/** Frees everything that JavaScript no longer reaches. */
export const collectGarbage: () => void = runInNewContext('gc')
