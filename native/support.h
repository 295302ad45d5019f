// What every file of the addon needs: errors, views of bytes, file descriptors, mappings and libuv handles that
// clean up after themselves.
#pragma once

#include <cerrno>
#include <memory>
#include <napi.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "libuv.h"

class Addon;
Addon& addonOf(Napi::Env env);

/** Throws the NodevisorError that TypeScript makes of a failed system call. */
[[noreturn]] void throwErrno(Napi::Env env, const char* syscall, int error = errno);
/** Throws the NodevisorError for a use after close(). */
[[noreturn]] void throwClosed(Napi::Env env, const char* what);

/** A file descriptor, closed with its owner. */
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }
  int get() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  void reset(int fd = -1) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_;
};

/** ioctl() that goes on after a signal: one that came for a slice may arrive when the slice is over. */
template <typename Argument>
int ioctlRetry(int fd, unsigned long request, Argument argument) {
  int result;
  do {
    result = ioctl(fd, request, argument);
  } while (result < 0 && errno == EINTR);
  return result;
}

/** The bytes of an argument that must be a Uint8Array. The binding's callers pass nothing else. */
struct Bytes {
  uint8_t* data;
  size_t length;
};
Bytes bytesOf(const Napi::Value& value, const char* name);
/** The same, of one struct exactly. */
uint8_t* structOf(const Napi::Value& value, size_t size, const char* name);

uint32_t uint32Of(const Napi::Value& value, const char* name);
/** A bigint or a number without fraction, as 64 bits. */
uint64_t uint64Of(const Napi::Value& value, const char* name);
Napi::Value toBytes(Napi::Env env, const void* data, size_t length);

/** Host memory that outlives whoever still looks at it: unmapped with the last reference, or by unmap(). */
class Mapping {
 public:
  Mapping(void* address, size_t length) : address_(address), length_(length) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { unmap(); }
  void unmap();
  uint8_t* data() const { return static_cast<uint8_t*>(address_); }
  size_t length() const { return length_; }

 private:
  void* address_;
  size_t length_;
};

/** An ArrayBuffer over a mapping, which close() detaches so that JavaScript can never see it unmapped. */
class ExternalBuffer {
 public:
  /** `hold`: not to be garbage-collected as long as this object lives. */
  Napi::Value create(Napi::Env env, std::shared_ptr<Mapping> mapping, size_t offset, size_t length, bool hold);
  Napi::Value value() const { return reference_.Value(); }
  /** JavaScript has no use for it any more. */
  bool collected() const;
  void detach();

 private:
  Napi::Reference<Napi::ArrayBuffer> reference_;
};

/** A libuv handle on the heap. libuv wants its memory until the close callback has run. */
template <typename T, uv_handle_type Type>
class UvHandle {
 public:
  UvHandle() : handle_(static_cast<T*>(::operator new(uv_handle_size(Type)))) {}
  UvHandle(const UvHandle&) = delete;
  UvHandle& operator=(const UvHandle&) = delete;
  ~UvHandle() { close(); }
  T* get() const { return handle_; }
  uv_handle_t* base() const { return reinterpret_cast<uv_handle_t*>(handle_); }
  void initialized(void* data) {
    uv_handle_set_data(base(), data);
    live_ = true;
  }
  bool live() const { return live_; }
  void close() {
    if (handle_ == nullptr) return;
    if (live_) {
      uv_close(base(), [](uv_handle_t* handle) { ::operator delete(handle); });
    } else {
      ::operator delete(handle_);
    }
    handle_ = nullptr;
    live_ = false;
  }

 private:
  T* handle_;
  bool live_ = false;
};

/** Calls a JavaScript function from the event loop. False if it threw or cannot run any more. */
bool callFromLoop(napi_env env, const Napi::FunctionReference& function, size_t count, const napi_value* arguments);
