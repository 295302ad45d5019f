import { constants } from 'node:fs'
import { open } from 'node:fs/promises'
import type { BootModule } from '../boot/boot-image.js'
import { alignUp } from '../boot/placement.js'
import { NodevisorError, show } from '../errors.js'
import { checkModule, describeSource, type ImageSource, type KernelOptions, listOf } from './options.js'

/** The largest image read, in bytes: what a Uint8Array can hold everywhere. */
const MAX_IMAGE_SIZE = 2 ** 31 - 1

/** What each image of an initrd begins at a multiple of. */
const INITRD_ALIGNMENT = 4

/** The bytes of an image. @throws `ERR_IMAGE_READ`, `ERR_IMAGE_TOO_LARGE` */
export async function readImage(source: ImageSource): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source
  if (typeof source !== 'string' && !(source instanceof URL)) return await readStream(source)
  const path = describeSource(source)
  try {
    // Not to wait for a FIFO's writer: what is no regular file is refused below.
    const file = await open(source, constants.O_RDONLY | constants.O_NONBLOCK)
    try {
      const stat = await file.stat()
      if (!stat.isFile()) {
        throw new NodevisorError('ERR_IMAGE_READ', `Expected a regular file but ${path} is none`, { path })
      }
      if (stat.size > MAX_IMAGE_SIZE) {
        throw tooLarge(path, stat.size)
      }
      return await file.readFile()
    } finally {
      await file.close()
    }
  } catch (cause) {
    if (cause instanceof NodevisorError) throw cause
    const why = cause instanceof Error ? cause.message : String(cause)
    throw new NodevisorError('ERR_IMAGE_READ', `Expected a readable image at ${path} but: ${why}`, {
      path,
      cause,
    })
  }
}

/** The modules of a kernel, read. */
export function readModules(kernel: KernelOptions): Promise<BootModule[]> {
  return Promise.all(
    (kernel.modules ?? []).map(async (module, index) => {
      const { image, cmdline } = checkModule(module, index)
      return { bytes: await readImage(image), cmdline }
    }),
  )
}

/** The initrd, read: several images one after the other, each at a multiple of 4 bytes, as Linux wants cpio archives. */
export async function readInitrd({ initrd }: KernelOptions): Promise<Uint8Array | undefined> {
  if (initrd === undefined) return undefined
  const images = await Promise.all(listOf(initrd).map(readImage))
  if (images.length === 1) return images[0]
  const size = images.reduce((sum, { length }) => alignUp(sum, INITRD_ALIGNMENT) + length, 0)
  if (size > MAX_IMAGE_SIZE) throw tooLarge('the initrd', size)
  const bytes = new Uint8Array(size)
  let end = 0
  for (const image of images) {
    const start = alignUp(end, INITRD_ALIGNMENT)
    bytes.set(image, start)
    end = start + image.length
  }
  return bytes
}

async function readStream(stream: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const chunks: Uint8Array[] = []
  let size = 0
  try {
    // Leaving the loop early destroys a Node stream and cancels a web stream.
    for await (const chunk of stream) {
      if (!(chunk instanceof Uint8Array)) throw new TypeError(`it gave ${show(chunk)}, not bytes`)
      size += chunk.length
      if (size > MAX_IMAGE_SIZE) throw tooLarge('the stream', size)
      chunks.push(chunk)
    }
  } catch (cause) {
    if (cause instanceof NodevisorError) throw cause
    const why = cause instanceof Error ? cause.message : String(cause)
    throw new NodevisorError('ERR_IMAGE_READ', `Expected a readable stream of bytes but: ${why}`, { cause })
  }
  if (size === 0) {
    throw new NodevisorError(
      'ERR_IMAGE_READ',
      'Expected a readable stream of bytes but it gave none; a stream can be read once only',
    )
  }
  return Buffer.concat(chunks, size)
}

function tooLarge(name: string, size: number): NodevisorError {
  return new NodevisorError(
    'ERR_IMAGE_TOO_LARGE',
    `Expected an image of less than 2 GiB but ${name} has ${size} bytes`,
    { path: name, size },
  )
}
