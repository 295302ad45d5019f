// The system calls on files that Node.js lacks, one function each. They return what the call does, errors as -errno.
#pragma once

#include <napi.h>

/** The object of functions that the addon exports as `fileIo`. */
Napi::Object defineFileIo(Napi::Env env);
