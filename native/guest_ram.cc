#include "guest_ram.h"

#include <algorithm>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>

#include "pagemap.h"

Napi::Function GuestRam::define(Napi::Env env) {
  return DefineClass(env, "GuestRam",
                     {InstanceMethod<&GuestRam::fd>("fd"), InstanceMethod<&GuestRam::buffer>("buffer"),
                      InstanceMethod<&GuestRam::copyOnWrite>("copyOnWrite"),
                      InstanceMethod<&GuestRam::privatePages>("privatePages"),
                      InstanceMethod<&GuestRam::discard>("discard"), InstanceMethod<&GuestRam::close>("close")});
}

// new GuestRam(bytes, hugePageSize, file): a huge page size of 0 means ordinary pages; a file of -1 means memory of its
// own, any other a copy-on-write mapping of the file.
GuestRam::GuestRam(const Napi::CallbackInfo& info) : Napi::ObjectWrap<GuestRam>(info) {
  Napi::Env env = info.Env();
  uint64_t size = uint64Of(info[0], "size");
  uint64_t hugePageSize = uint64Of(info[1], "hugePageSize");
  int file = info[2].As<Napi::Number>().Int32Value();
  if (file >= 0) {
    fd_.reset(fcntl(file, F_DUPFD_CLOEXEC, 0));
    if (!fd_.open()) throwErrno(env, "fcntl(F_DUPFD_CLOEXEC)");
    map(env, size, MAP_PRIVATE | MAP_NORESERVE);
    return;
  }
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (hugePageSize != 0) flags |= MFD_HUGETLB | (static_cast<unsigned>(__builtin_ctzll(hugePageSize)) << MFD_HUGE_SHIFT);
  fd_.reset(memfd_create("nodevisor-ram", flags));
  if (!fd_.open()) throwErrno(env, "memfd_create");
  if (ftruncate(fd_.get(), static_cast<off_t>(size)) != 0) throwErrno(env, "ftruncate");
  // A file that shrinks under a mapping would turn guest accesses into SIGBUS.
  fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  // Huge pages are reserved here, so that there are enough or this call fails; ordinary ones come as they are touched.
  map(env, size, MAP_SHARED | (hugePageSize == 0 ? MAP_NORESERVE : 0));
}

void GuestRam::map(Napi::Env env, size_t size, int flags) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd_.get(), 0);
  if (address == MAP_FAILED) throwErrno(env, "mmap");
  mapping_ = std::make_shared<Mapping>(address, size);
}

Napi::Value GuestRam::fd(const Napi::CallbackInfo& info) {
  if (!mapping_) throwClosed(info.Env(), "GuestRam");
  return Napi::Number::New(info.Env(), fd_.get());
}

// buffer(offset, length): an ArrayBuffer over that part of RAM, detached by close().
Napi::Value GuestRam::buffer(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!mapping_) throwClosed(env, "GuestRam");
  uint64_t offset = uint64Of(info[0], "offset");
  uint64_t length = uint64Of(info[1], "length");
  if (offset > mapping_->length() || length > mapping_->length() - offset) {
    throw Napi::RangeError::New(env, "Expected a part of the RAM for offset and length");
  }
  if (buffers_.size() >= pruneAt_) {
    buffers_.erase(
        std::remove_if(buffers_.begin(), buffers_.end(), [](const auto& buffer) { return buffer->collected(); }),
        buffers_.end());
    pruneAt_ = 2 * buffers_.size() + 64;
  }
  buffers_.push_back(std::make_unique<ExternalBuffer>());
  return buffers_.back()->create(env, mapping_, offset, length, false);
}

// copyOnWrite(): from now on what is written stays in this mapping, at the same addresses, and the file as it is.
Napi::Value GuestRam::copyOnWrite(const Napi::CallbackInfo& info) {
  if (!mapping_) throwClosed(info.Env(), "GuestRam");
  int flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED;
  void* address = mmap(mapping_->data(), mapping_->length(), PROT_READ | PROT_WRITE, flags, fd_.get(), 0);
  if (address == MAP_FAILED) throwErrno(info.Env(), "mmap");
  return info.Env().Undefined();
}

// privatePages(): of a copy-on-write mapping, the pages that are not the file's any more, as pairs of first page and
// number of pages.
Napi::Value GuestRam::privatePages(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!mapping_) throwClosed(env, "GuestRam");
  if (!pagemap_.open()) pagemap_.reset(openPagemap());
  std::vector<uint32_t> runs;
  if (!pagemap_.open() || !::privatePages(pagemap_.get(), mapping_->data(), mapping_->length(), runs)) {
    throwErrno(env, "pagemap");
  }
  auto result = Napi::Uint32Array::New(env, runs.size());
  std::copy(runs.begin(), runs.end(), result.Data());
  return result;
}

// discard(runs): of a copy-on-write mapping, lets these pages (as of privatePages) be the file's again.
Napi::Value GuestRam::discard(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!mapping_) throwClosed(env, "GuestRam");
  auto runs = info[0].As<Napi::Uint32Array>();
  for (size_t i = 0; i + 1 < runs.ElementLength(); i += 2) {
    size_t offset = static_cast<size_t>(runs[i]) * kPageSize;
    size_t length = static_cast<size_t>(runs[i + 1]) * kPageSize;
    if (offset > mapping_->length() || length > mapping_->length() - offset) {
      throw Napi::RangeError::New(env, "Expected pages of the RAM");
    }
    if (madvise(mapping_->data() + offset, length, MADV_DONTNEED) != 0) throwErrno(env, "madvise");
  }
  return env.Undefined();
}

Napi::Value GuestRam::close(const Napi::CallbackInfo& info) {
  // A VM that still has a slot here keeps the mapping until it is closed itself.
  for (auto& buffer : buffers_) buffer->detach();
  buffers_.clear();
  mapping_.reset();
  fd_.reset();
  pagemap_.reset();
  return info.Env().Undefined();
}
