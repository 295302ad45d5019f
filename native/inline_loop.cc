#include "inline_loop.h"

#include <poll.h>

#include "slice_watcher.h"
#include "vcpu.h"

namespace {
/** A loop that always has work (setImmediate without end) still lets the guest run, this often and this long. */
constexpr uint64_t kBusyLoopPauseNanoseconds = 1000000;
constexpr int kBusyLoopSliceMilliseconds = 1;
/** Slices in a row that the loop's work may cancel before one goes ahead regardless. */
constexpr int kMaxSkippedSlices = 8;
/** How long the loop is watched for what has just been begun: less than it takes to get a vCPU out of the guest. */
constexpr long kLingerNanoseconds = 40000;
}  // namespace

Napi::Function InlineLoop::define(Napi::Env env) {
  return DefineClass(env, "InlineLoop",
                     {InstanceMethod<&InlineLoop::start>("start"), InstanceMethod<&InlineLoop::stop>("stop"),
                      InstanceMethod<&InlineLoop::target>("target"), InstanceMethod<&InlineLoop::limit>("limit"),
                      InstanceMethod<&InlineLoop::linger>("linger"), InstanceMethod<&InlineLoop::control>("control")});
}

// new InlineLoop(slice): slice() runs guests until control()[0] is not 0.
InlineLoop::InlineLoop(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<InlineLoop>(info), addon_(&addonOf(info.Env())) {
  slice_ = Napi::Persistent(info[0].As<Napi::Function>());
  auto control = addon_->sliceWatcher().control();
  if (control->data() == nullptr) throwErrno(info.Env(), "mmap", ENOMEM);
  control_.create(info.Env(), control, 0, sizeof(int32_t), true);
  uv_prepare_init(addon_->loop(), prepare_.get());
  prepare_.initialized(this);
  uv_idle_init(addon_->loop(), idle_.get());
  idle_.initialized(this);
  addon_->add(this);
}

InlineLoop::~InlineLoop() {
  if (Env().GetInstanceData<Addon>() != nullptr) addon_->remove(this);
}

Napi::Value InlineLoop::start(const Napi::CallbackInfo& info) {
  if (!running_ && prepare_.live()) {
    addon_->sliceWatcher().start(info.Env());
    running_ = true;
    Ref();
    uv_prepare_start(prepare_.get(), [](uv_prepare_t* handle) {
      static_cast<InlineLoop*>(uv_handle_get_data(reinterpret_cast<uv_handle_t*>(handle)))->onPrepare();
    });
    uv_idle_start(idle_.get(), [](uv_idle_t*) {});
  }
  return info.Env().Undefined();
}

void InlineLoop::halt() {
  running_ = false;
  if (!prepare_.live()) return;
  uv_prepare_stop(prepare_.get());
  uv_idle_stop(idle_.get());
}

Napi::Value InlineLoop::stop(const Napi::CallbackInfo& info) {
  if (running_) {
    halt();
    Unref();
  }
  return info.Env().Undefined();
}

// target(vcpu): the slice runs this vCPU from now on. False if it should be left before that.
Napi::Value InlineLoop::target(const Napi::CallbackInfo& info) {
  auto vcpu = Vcpu::Unwrap(info[0].As<Napi::Object>())->state();
  if (!vcpu) throwClosed(info.Env(), "Vcpu");
  bool enter = addon_->sliceWatcher().target(vcpu);
  skipped_ = enter ? 0 : skipped_ + 1;
  return Napi::Boolean::New(info.Env(), enter);
}

// limit(milliseconds): the slice under way ends by then.
Napi::Value InlineLoop::limit(const Napi::CallbackInfo& info) {
  addon_->sliceWatcher().limit(info[0].As<Napi::Number>().DoubleValue());
  return info.Env().Undefined();
}

// linger(): what has just been begun may be done in a moment; the next slice waits for that before the guest goes on.
Napi::Value InlineLoop::linger(const Napi::CallbackInfo& info) {
  lingers_ = true;
  return info.Env().Undefined();
}

// control(): an ArrayBuffer of one int32, 1 once the slice should be left.
Napi::Value InlineLoop::control(const Napi::CallbackInfo&) { return control_.value(); }

void InlineLoop::onPrepare() {
  // Our own idle handle would make the loop's timeout 0. It keeps the loop from blocking after the slice.
  uv_idle_stop(idle_.get());
  uv_update_time(addon_->loop());
  int timeout = uv_backend_timeout(addon_->loop());
  bool hasWork = timeout == 0;
  if (lingers_ && !hasWork) {
    hasWork = lingering_.attempt([this] {
      pollfd watched = {uv_backend_fd(addon_->loop()), POLLIN, 0};
      timespec moment = {0, kLingerNanoseconds};
      return ppoll(&watched, 1, &moment, nullptr) > 0;
    });
  }
  lingers_ = false;
  if (!hasWork || uv_hrtime() - lastSliceEnd_ >= kBusyLoopPauseNanoseconds) {
    auto& watcher = addon_->sliceWatcher();
    bool yields = timeout != 0 && skipped_ < kMaxSkippedSlices;
    watcher.arm(yields ? timeout : kBusyLoopSliceMilliseconds, yields);
    bool ran = false;
    {
      Napi::HandleScope scope(Env());
      ran = callFromLoop(Env(), slice_, 0, nullptr);
    }
    watcher.disarm();
    watcher.target(nullptr);
    lastSliceEnd_ = uv_hrtime();
    if (!ran) halt();
  }
  if (running_) uv_idle_start(idle_.get(), [](uv_idle_t*) {});
}

void InlineLoop::stopForExit() {
  halt();
  prepare_.close();
  idle_.close();
}
