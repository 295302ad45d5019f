/** The bytes of one kernel struct, reused for every call: ioctls copy in and out. */
export class Struct {
  readonly bytes: Uint8Array
  readonly view: DataView

  constructor(size: number) {
    this.bytes = new Uint8Array(size)
    this.view = new DataView(this.bytes.buffer)
  }

  /** All bytes 0 again. */
  clear(): this {
    this.bytes.fill(0)
    return this
  }
}
