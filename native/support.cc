#include "support.h"

#include <sys/mman.h>

#include "addon.h"

void throwErrno(Napi::Env env, const char* syscall, int error) {
  auto value = addonOf(env).errorFactory().Call({Napi::String::New(env, syscall), Napi::Number::New(env, error)});
  throw Napi::Error(env, value);
}

void throwClosed(Napi::Env env, const char* what) {
  auto value = addonOf(env).errorFactory().Call({Napi::String::New(env, what), Napi::Number::New(env, 0)});
  throw Napi::Error(env, value);
}

Bytes bytesOf(const Napi::Value& value, const char* name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    throw Napi::TypeError::New(value.Env(), std::string("Expected a Uint8Array for ") + name);
  }
  auto array = value.As<Napi::Uint8Array>();
  return {array.Data(), array.ByteLength()};
}

uint8_t* structOf(const Napi::Value& value, size_t size, const char* name) {
  auto bytes = bytesOf(value, name);
  if (bytes.length != size) {
    throw Napi::RangeError::New(value.Env(), "Expected " + std::to_string(size) + " bytes for " + name +
                                                 " but received " + std::to_string(bytes.length));
  }
  return bytes.data;
}

uint32_t uint32Of(const Napi::Value& value, const char* name) {
  if (!value.IsNumber()) throw Napi::TypeError::New(value.Env(), std::string("Expected a number for ") + name);
  return value.As<Napi::Number>().Uint32Value();
}

uint64_t uint64Of(const Napi::Value& value, const char* name) {
  if (value.IsBigInt()) {
    bool lossless = false;
    return value.As<Napi::BigInt>().Uint64Value(&lossless);
  }
  if (!value.IsNumber()) {
    throw Napi::TypeError::New(value.Env(), std::string("Expected a number or bigint for ") + name);
  }
  return static_cast<uint64_t>(value.As<Napi::Number>().Int64Value());
}

Napi::Value toBytes(Napi::Env env, const void* data, size_t length) {
  auto array = Napi::Uint8Array::New(env, length);
  if (length > 0) std::memcpy(array.Data(), data, length);
  return array;
}

void Mapping::unmap() {
  if (address_ != nullptr) munmap(address_, length_);
  address_ = nullptr;
}

Napi::Value ExternalBuffer::create(Napi::Env env, std::shared_ptr<Mapping> mapping, size_t offset, size_t length,
                                  bool hold) {
  auto* owner = new std::shared_ptr<Mapping>(mapping);
  auto buffer = Napi::ArrayBuffer::New(
      env, mapping->data() + offset, length, [](Napi::Env, void*, std::shared_ptr<Mapping>* held) { delete held; },
      owner);
  reference_ = hold ? Napi::Persistent(buffer) : Napi::Weak(buffer);
  return buffer;
}

bool ExternalBuffer::collected() const {
  Napi::HandleScope scope(reference_.Env());
  return reference_.Value().IsEmpty();
}

void ExternalBuffer::detach() {
  if (reference_.IsEmpty()) return;
  Napi::HandleScope scope(reference_.Env());
  auto buffer = reference_.Value();
  if (!buffer.IsEmpty()) buffer.Detach();
  reference_.Reset();
}

bool callFromLoop(napi_env env, const Napi::FunctionReference& function, size_t count, const napi_value* arguments) {
  // The C interface: while a worker is being terminated no JavaScript value can be made, and the C++ wrapper
  // would try to make an Error.
  napi_value callee = nullptr;
  napi_value global = nullptr;
  if (napi_get_reference_value(env, function, &callee) != napi_ok || callee == nullptr) return false;
  if (napi_get_global(env, &global) != napi_ok) return false;
  napi_status status = napi_make_callback(env, nullptr, global, callee, count, arguments, nullptr);
  if (status == napi_pending_exception) {
    napi_value exception = nullptr;
    if (napi_get_and_clear_last_exception(env, &exception) == napi_ok) napi_fatal_exception(env, exception);
  }
  return status == napi_ok;
}
