/** Numbers of different kinds that must not be mixed up: a port is not an address. */
declare const brand: unique symbol
type Branded<Name extends string> = number & { readonly [brand]: Name }

/** An x86 I/O port, 0 to 0xffff. */
export type Port = Branded<'port'>

/** A guest-physical address in bytes, below 2^53. */
export type GuestAddress = Branded<'guest-physical address'>
