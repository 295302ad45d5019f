#include "file_io.h"

#include <algorithm>
#include <climits>
#include <fcntl.h>
#include <linux/fs.h>
#include <memory>
#include <sys/uio.h>
#include <unistd.h>

#include "support.h"

namespace {

using VectorCall = ssize_t (*)(int, const iovec*, int, off_t, int);

// (fd, buffers, offset): buffers after the first IOV_MAX are left out, which is a short transfer.
Napi::Value transferNowait(const Napi::CallbackInfo& info, VectorCall call) {
  Napi::Env env = info.Env();
  int fd = static_cast<int>(uint32Of(info[0], "fd"));
  auto list = info[1].As<Napi::Array>();
  auto offset = static_cast<off_t>(uint64Of(info[2], "offset"));
  iovec vectors[IOV_MAX];
  uint32_t count = std::min<uint32_t>(list.Length(), IOV_MAX);
  for (uint32_t i = 0; i < count; i++) {
    Napi::HandleScope scope(env);
    auto bytes = bytesOf(list.Get(i), "buffers");
    vectors[i] = {bytes.data, bytes.length};
  }
  ssize_t result = call(fd, vectors, static_cast<int>(count), offset, RWF_NOWAIT);
  return Napi::Number::New(env, static_cast<double>(result < 0 ? -errno : result));
}

Napi::Value preadvNowait(const Napi::CallbackInfo& info) { return transferNowait(info, preadv2); }

Napi::Value pwritevNowait(const Napi::CallbackInfo& info) { return transferNowait(info, pwritev2); }

/** fallocate() on a thread of libuv's pool. */
struct Allocation {
  int fd;
  int mode;
  off_t offset;
  off_t length;
  int result = 0;
  napi_deferred deferred = nullptr;
  napi_async_work work = nullptr;

  static void execute(napi_env, void* data) {
    auto* self = static_cast<Allocation*>(data);
    do {
      self->result = fallocate(self->fd, self->mode, self->offset, self->length) < 0 ? -errno : 0;
    } while (self->result == -EINTR);
  }

  // The C interface: in a worker that is being terminated the promise cannot be resolved any more, and the C++
  // wrapper would try to make an Error of that.
  static void complete(napi_env env, napi_status, void* data) {
    std::unique_ptr<Allocation> self(static_cast<Allocation*>(data));
    napi_value result = nullptr;
    if (napi_create_int32(env, self->result, &result) == napi_ok) napi_resolve_deferred(env, self->deferred, result);
    napi_delete_async_work(env, self->work);
  }
};

// fallocate(fd, mode, offset, length): a promise of 0 or -errno.
Napi::Value startFallocate(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  auto allocation = std::make_unique<Allocation>();
  allocation->fd = static_cast<int>(uint32Of(info[0], "fd"));
  allocation->mode = static_cast<int>(uint32Of(info[1], "mode"));
  allocation->offset = static_cast<off_t>(uint64Of(info[2], "offset"));
  allocation->length = static_cast<off_t>(uint64Of(info[3], "length"));
  napi_value promise = nullptr;
  auto name = Napi::String::New(env, "nodevisor:fallocate");
  if (napi_create_async_work(env, nullptr, name, Allocation::execute, Allocation::complete, allocation.get(),
                             &allocation->work) != napi_ok ||
      napi_create_promise(env, &allocation->deferred, &promise) != napi_ok ||
      napi_queue_async_work(env, allocation->work) != napi_ok) {
    throw Napi::Error::New(env);
  }
  allocation.release();
  return Napi::Value(env, promise);
}

Napi::Value setLock(const Napi::CallbackInfo& info, short type) {
  struct flock range = {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  int result = fcntl(static_cast<int>(uint32Of(info[0], "fd")), F_OFD_SETLK, &range);
  return Napi::Number::New(info.Env(), result < 0 ? -errno : 0);
}

// lock(fd, exclusive): the whole file, for as long as this open file description lives; never waits.
Napi::Value lockFile(const Napi::CallbackInfo& info) { return setLock(info, info[1].ToBoolean() ? F_WRLCK : F_RDLCK); }

// unlock(fd): takes such a lock back.
Napi::Value unlockFile(const Napi::CallbackInfo& info) { return setLock(info, F_UNLCK); }

// blockDeviceSize(fd): bytes.
Napi::Value blockDeviceSize(const Napi::CallbackInfo& info) {
  uint64_t size = 0;
  int result = ioctlRetry(static_cast<int>(uint32Of(info[0], "fd")), BLKGETSIZE64, &size);
  return Napi::Number::New(info.Env(), result < 0 ? -errno : static_cast<double>(size));
}

// (fd, offset): where data, or a hole, begins at or after the offset. Moves the file's own offset, which nobody uses.
Napi::Value seek(const Napi::CallbackInfo& info, int whence) {
  auto offset = static_cast<off_t>(uint64Of(info[1], "offset"));
  off_t result = lseek(static_cast<int>(uint32Of(info[0], "fd")), offset, whence);
  return Napi::Number::New(info.Env(), static_cast<double>(result < 0 ? -errno : result));
}

Napi::Value seekData(const Napi::CallbackInfo& info) { return seek(info, SEEK_DATA); }

Napi::Value seekHole(const Napi::CallbackInfo& info) { return seek(info, SEEK_HOLE); }

}  // namespace

Napi::Object defineFileIo(Napi::Env env) {
  auto functions = Napi::Object::New(env);
  functions.Set("preadvNowait", Napi::Function::New(env, preadvNowait, "preadvNowait"));
  functions.Set("pwritevNowait", Napi::Function::New(env, pwritevNowait, "pwritevNowait"));
  functions.Set("fallocate", Napi::Function::New(env, startFallocate, "fallocate"));
  functions.Set("lock", Napi::Function::New(env, lockFile, "lock"));
  functions.Set("unlock", Napi::Function::New(env, unlockFile, "unlock"));
  functions.Set("blockDeviceSize", Napi::Function::New(env, blockDeviceSize, "blockDeviceSize"));
  functions.Set("seekData", Napi::Function::New(env, seekData, "seekData"));
  functions.Set("seekHole", Napi::Function::New(env, seekHole, "seekHole"));
  return functions;
}
