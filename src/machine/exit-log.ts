import type { VcpuExit } from '../kvm/exits.js'

/** An exit, as it is remembered for reports. */
export interface ExitRecord {
  readonly vcpu: number
  readonly kind: VcpuExit['kind']
  /** What an access did: `in`, `out`, `read` or `write`. */
  readonly direction?: 'in' | 'out' | 'read' | 'write'
  /** Port or guest-physical address of an access. */
  readonly address?: number
  /** Bytes of an access; of the first where a string instruction makes several. */
  readonly size?: number
  /** What was written, or read; of 8 bytes the lower 4. */
  readonly value?: number
}

const CAPACITY = 64

class Slot {
  vcpu = 0
  kind: VcpuExit['kind'] = 'other'
  direction: ExitRecord['direction']
  address = 0
  size = 0
  value = 0
}

/** The last exits of a machine. Always on, so it allocates nothing for one. */
export class ExitLog {
  readonly #slots = Array.from({ length: CAPACITY }, () => new Slot())
  #count = 0

  /** @param run - the vCPU's `kvm_run`, where the data of an access is */
  record(vcpu: number, exit: VcpuExit, run: DataView): void {
    const slot = this.#slots[this.#count++ % CAPACITY]!
    slot.vcpu = vcpu
    slot.kind = exit.kind
    if (exit.kind === 'io') {
      slot.direction = exit.direction
      slot.address = exit.port
      slot.size = exit.size
      slot.value = valueAt(run, exit.dataOffset, exit.size)
    } else if (exit.kind === 'mmio') {
      slot.direction = exit.direction
      slot.address = exit.address
      slot.size = exit.size
      slot.value = valueAt(run, exit.dataOffset, exit.size)
    } else {
      slot.direction = undefined
    }
  }

  /** The oldest first. */
  get records(): ExitRecord[] {
    const length = Math.min(this.#count, CAPACITY)
    return Array.from({ length }, (_, i) => {
      const slot = this.#slots[(this.#count - length + i) % CAPACITY]!
      const { vcpu, kind, direction, address, size, value } = slot
      return direction === undefined ? { vcpu, kind } : { vcpu, kind, direction, address, size, value }
    })
  }
}

function valueAt(run: DataView, offset: number, size: number): number {
  if (size === 1) return run.getUint8(offset)
  if (size === 2) return run.getUint16(offset, true)
  const value = run.getUint32(offset, true)
  // An access that ends in another page comes in pieces of any size.
  return size === 3 ? value & 0xff_ffff : value
}
