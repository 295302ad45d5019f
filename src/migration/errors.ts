import { NodevisorError } from '../errors.js'
import { failed } from './protocol.js'

/**
 * What `migrate()` throws.
 *
 * @param isUncertain - whether the machine may run at the other side
 */
export function moveError(cause: unknown, isUncertain: boolean): NodevisorError {
  if (isUncertain) {
    return failed(
      `${messageOf(cause)}; it is not known whether the machine runs at the other side: only if it does not, let it go ` +
        'on here by resume()',
      { cause, uncertain: true },
    )
  }
  if (isFailed(cause)) return cause
  return failed(`The machine could not be moved, and goes on here: ${messageOf(cause)}`, { cause })
}

/** What `receive()` throws. */
export function receiveError(cause: unknown): NodevisorError {
  if (isFailed(cause)) return cause
  return failed(`The machine could not be received: ${messageOf(cause)}`, { cause })
}

function isFailed(error: unknown): error is NodevisorError {
  return error instanceof NodevisorError && error.code === 'ERR_MIGRATION_FAILED'
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}
