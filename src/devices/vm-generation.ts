import { randomBytes } from 'node:crypto'
import { invalidArgument } from '../errors.js'
import type { GuestMemory } from '../memory/guest-memory.js'
import { GENERATION_GPE } from '../wiring.js'
import type { AcpiPm } from './acpi-pm.js'

// "Virtual Machine Generation ID", Microsoft, August 2012

const ID_SIZE = 16

/** How to make a {@link VmGeneration}. */
export interface VmGenerationOptions {
  readonly memory: GuestMemory
  /** Where the generation ID is, as the firmware tables say. */
  readonly address: number
  readonly acpiPm: AcpiPm
}

/**
 * The VM generation ID: 16 random bytes in guest memory. They become others when the guest goes on from a state from
 * which it, or a copy of it, has gone on before, so that it makes new seeds for its random numbers, and new identifiers.
 */
export class VmGeneration {
  readonly #memory: GuestMemory
  readonly #address: number
  readonly #acpiPm: AcpiPm

  constructor({ memory, address, acpiPm }: VmGenerationOptions) {
    this.#memory = memory
    this.#address = address
    this.#acpiPm = acpiPm
  }

  /**
   * Begins a new generation, while the guest stands still or runs.
   *
   * @param id - 16 bytes that no other generation of any machine has
   * @throws `ERR_INVALID_ARGUMENT` for more or fewer
   */
  renew(id: Uint8Array = randomBytes(ID_SIZE)): void {
    if (id.length !== ID_SIZE) throw invalidArgument('id', `${ID_SIZE} bytes`, id)
    this.#memory.write(this.#address, id)
    this.#acpiPm.raiseGpe(GENERATION_GPE)
  }
}
