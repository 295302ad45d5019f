/** What the loaders of formats with headers share. */

import { hex, NodevisorError } from '../errors.js'

/** Facts of an error about a header. */
export interface FormatFacts {
  /** The field that is wrong, by its name in the specification. */
  readonly field: string
  readonly [fact: string]: unknown
}

/** A view of all of an image's bytes. */
export function viewOf(image: Uint8Array): DataView {
  return new DataView(image.buffer, image.byteOffset, image.byteLength)
}

/** The error for a header that says what no loader can do. */
export function formatError(
  expected: string,
  received: string,
  remedy: string,
  facts: FormatFacts,
): NodevisorError {
  return new NodevisorError(
    'ERR_IMAGE_FORMAT',
    `Expected ${expected} but received ${received}; ${remedy}`,
    facts,
  )
}

/** The error for `size` bytes at `offset` that the image does not have. */
export function truncatedError(
  what: string,
  offset: bigint,
  size: bigint,
  imageSize: number,
  remedy = 'copy or link it again',
): NodevisorError {
  return new NodevisorError(
    'ERR_IMAGE_TRUNCATED',
    `Expected ${what} at offset ${hex(offset)}, ${size} bytes long, but the image ends after ${imageSize} ` +
      `bytes; ${remedy}`,
    { offset, size, imageSize },
  )
}
