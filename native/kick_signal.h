// The signal that takes a thread out of KVM_RUN. A signal's disposition belongs to the process, so this is the one
// thing that all environments share.
#pragma once

/** Installs the handler once per process and returns the signal's number, or -1 when no real-time signal is free. */
int kickSignal();
/** Lets the calling thread receive it. */
void unblockKickSignal();
