#include "vcpu_thread.h"

#include <csignal>

#include "exit_queue.h"
#include "kick_signal.h"

Napi::Function VcpuThread::define(Napi::Env env) {
  return DefineClass(env, "VcpuThread",
                     {InstanceMethod<&VcpuThread::resume>("resume"), InstanceMethod<&VcpuThread::kick>("kick"),
                      InstanceMethod<&VcpuThread::stop>("stop")});
}

// new VcpuThread(vcpu, onExit): onExit(errno) is called from the event loop for every return of KVM_RUN.
VcpuThread::VcpuThread(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<VcpuThread>(info), addon_(&addonOf(info.Env())) {
  vcpu_ = Vcpu::Unwrap(info[0].As<Napi::Object>())->state();
  if (!vcpu_) throwClosed(info.Env(), "Vcpu");
  onExit_ = Napi::Persistent(info[1].As<Napi::Function>());
  addon_->exitQueue();
  addon_->add(this);
}

VcpuThread::~VcpuThread() {
  join();
  if (Env().GetInstanceData<Addon>() != nullptr) addon_->remove(this);
}

void VcpuThread::start(Napi::Env env) {
  if (kickSignal() < 0) throwErrno(env, "sigaction", EAGAIN);
  // The program's signals belong to the program's threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 * 1024);
  int error = pthread_create(
      &thread_, &attributes,
      [](void* self) -> void* {
        static_cast<VcpuThread*>(self)->main();
        return nullptr;
      },
      this);
  pthread_attr_destroy(&attributes);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) throwErrno(env, "pthread_create", error);
  started_ = true;
  Ref();
}

void VcpuThread::main() {
  pthread_setname_np(pthread_self(), "nodevisor-vcpu");
  unblockKickSignal();
  auto ordered = [this] { return command_ != Command::wait; };
  for (;;) {
    if (!spin_.wait(ordered)) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, ordered);
    }
    Command expected = Command::run;
    if (!command_.compare_exchange_strong(expected, Command::wait)) return;
    error_ = vcpu_->enter();
    addon_->exitQueue().post(this);
  }
}

void VcpuThread::order(Command command) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    command_ = command;
  }
  wake_.notify_one();
}

// resume(): KVM_RUN on the thread. One call, one onExit().
Napi::Value VcpuThread::resume(const Napi::CallbackInfo& info) {
  if (!vcpu_ || vcpu_->closed) throwClosed(info.Env(), "Vcpu");
  if (vcpu_->busy) throwErrno(info.Env(), "resume(vcpu)", EBUSY);
  if (!started_) start(info.Env());
  vcpu_->busy = true;
  addon_->exitQueue().runStarted();
  vcpu_->clearExitRequest();
  order(Command::run);
  return info.Env().Undefined();
}

void VcpuThread::deliverExit() {
  vcpu_->busy = false;
  addon_->exitQueue().runEnded();
  Napi::Env env = Env();
  Napi::HandleScope scope(env);
  napi_value error = nullptr;
  if (napi_create_int32(env, error_, &error) == napi_ok) callFromLoop(env, onExit_, 1, &error);
}

// kick(): a KVM_RUN under way returns with EINTR.
Napi::Value VcpuThread::kick(const Napi::CallbackInfo& info) {
  if (vcpu_ && vcpu_->busy) {
    vcpu_->requestExit();
    pthread_kill(thread_, kickSignal());
  }
  return info.Env().Undefined();
}

// stop(): ends the thread, for good. An exit that was not delivered yet is dropped.
Napi::Value VcpuThread::stop(const Napi::CallbackInfo& info) {
  bool wasStarted = started_;
  join();
  // The callback mostly refers to this object, which as long as this refers to the callback would never be collected.
  onExit_.Reset();
  vcpu_.reset();
  if (wasStarted) Unref();
  return info.Env().Undefined();
}

void VcpuThread::join() {
  if (!started_) return;
  if (vcpu_->busy) vcpu_->requestExit();
  order(Command::end);
  pthread_kill(thread_, kickSignal());
  pthread_join(thread_, nullptr);
  started_ = false;
  addon_->exitQueue().forget(this);
  if (vcpu_->busy) {
    vcpu_->busy = false;
    addon_->exitQueue().runEnded();
  }
  command_ = Command::wait;
}
