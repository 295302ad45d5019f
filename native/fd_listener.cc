#include "fd_listener.h"

#include "addon.h"

void FdListener::start(Napi::Env env, int fd, Napi::Function callback) {
  env_ = env;
  callback_ = Napi::Persistent(callback);
  poll_ = std::make_unique<UvHandle<uv_poll_t, UV_POLL>>();
  int error = uv_poll_init(addonOf(env).loop(), poll_->get(), fd);
  if (error != 0) {
    stop();
    throwErrno(env, "uv_poll_init", -error);
  }
  poll_->initialized(this);
  uv_poll_start(poll_->get(), UV_READABLE, [](uv_poll_t* handle, int, int) {
    auto* self = static_cast<FdListener*>(uv_handle_get_data(reinterpret_cast<uv_handle_t*>(handle)));
    Napi::HandleScope scope(self->env_);
    callFromLoop(self->env_, self->callback_, 0, nullptr);
  });
}

bool FdListener::stop() {
  if (!poll_) return false;
  poll_.reset();
  callback_.Reset();
  return true;
}

void FdListener::stopForExit() {
  if (poll_) poll_->close();
}
