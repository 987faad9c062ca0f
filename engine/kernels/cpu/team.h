// Threads that share one worker's products, and lend their cores to the machine's other workers.
//
//   run(tasks, f)   f(task, thread) for each of 0 … tasks - 1, by this thread and by as many helpers as may come
//
// Invariant: helpers are welcome, never needed. Tasks are handed out one at a time, so a helper that the system runs
// late delays a product by the one task it holds; and if another worker has taken its core meanwhile, the starter
// fetches the helper to its own core and lets it finish there. Between steps helpers sleep; inside one they spin, for
// the next product is microseconds away.
//
// Lending. All workers of a machine share a table with a line for each: how many cores are its own, and when it last
// began a task. A worker may use every core that no other worker, seen busy within the last BUSY, owns. A worker
// that dies stops writing, and so lends all it had. A product of many rows takes long, so the starter looks again
// while it is at one: cores that fall idle are used soon, and helpers leave cores that are wanted back.
#pragma once

#include <atomic>
#include <condition_variable>
#include <ctime>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace tandem {

constexpr int64_t BUSY = 5'000'000;  // nanoseconds; longer than any task
constexpr int64_t GLANCE = 200'000;  // nanoseconds between looks at the table
constexpr int SPINS = 2000;          // looks at a helper before it counts as held up; some 50 microseconds

struct alignas(64) Line {        // cores.py has the same
    std::atomic<int64_t> seen;     // CLOCK_MONOTONIC, nanoseconds, of the last task; 0: at rest
    std::atomic<int32_t> cores;    // that this worker owns
    std::atomic<int32_t> prompts;  // that wait for it or are computed by it, if it is a prefill worker
};

inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline void rest() {  // leaves the core, so that the system can move whoever is waited for to it
    timespec moment{0, 20'000};
    nanosleep(&moment, nullptr);
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

class Team {
  public:
    // `table` may be null: then nothing is lent and every thread is always used. Helpers yield by `niceness` to the
    // thread that makes the team.
    Team(int threads, int niceness, Line* table, int lines, int mine)
        : table_(table), lines_(lines), mine_(mine), threads_(threads), scratch_(threads), helpers_(threads) {
        niceness += getpriority(PRIO_PROCESS, 0);
        sched_getaffinity(0, sizeof anywhere_, &anywhere_);
        for (int index = 1; index < threads; index++)
            helpers_[index].thread = std::thread([this, index, niceness] { help(index, niceness); });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ending_ = true;
        }
        wake_.notify_all();
        for (Helper& helper : helpers_)
            if (helper.thread.joinable()) helper.thread.join();
    }

    void begin() { stepping_.store(true); }
    void end() {
        stepping_.store(false);
        if (table_) table_[mine_].seen.store(0, std::memory_order_relaxed);
    }

    // How many threads may work `now`.
    int welcome(int64_t now) const {
        if (!table_) return threads_;
        int taken = 0;
        for (int line = 0; line < lines_; line++)
            if (line != mine_ && now - table_[line].seen.load(std::memory_order_relaxed) < BUSY)
                taken += table_[line].cores.load(std::memory_order_relaxed);
        return std::max(table_[mine_].cores.load(std::memory_order_relaxed), threads_ - taken);
    }

    template <class F> void run(int64_t tasks, F&& work) {
        if (threads_ < 2 || tasks < 2) {
            for (int64_t task = 0; task < tasks; task++) stamp(), work(task, 0);
            return;
        }
        job_ = [&work](int64_t task, int thread) { work(task, thread); };
        tasks_ = tasks;
        next_.store(0);
        glanced_ = 0;
        open_.store(true);
        take_part(0);
        open_.store(false);
        for (int index = 1; index < threads_; index++) await(helpers_[index]);
    }

    float* scratch(int thread, size_t floats) {  // this thread's own memory, kept
        if (scratch_[thread].size() < floats) scratch_[thread].resize(floats);
        return scratch_[thread].data();
    }

  private:
    struct Helper {
        std::thread thread;
        std::atomic<int> id{0};           // of the thread, to the system
        std::atomic<bool> inside{false};  // it may be at a task
        bool fetched = false;             // to the starter's core
    };

    int64_t stamp() {
        int64_t now = nanoseconds();
        if (table_) table_[mine_].seen.store(now, std::memory_order_relaxed);
        return now;
    }
    void take_part(int thread) {
        while (thread == 0 || thread < wanted_.load(std::memory_order_relaxed)) {
            int64_t task = next_.fetch_add(1);
            if (task >= tasks_) return;
            int64_t now = stamp();
            if (thread == 0 && now - glanced_ >= GLANCE) glance(now);
            job_(task, thread);
        }
    }
    void glance(int64_t now) {
        glanced_ = now;
        int want = welcome(now);
        wanted_.store(want);
        call(want);
    }
    // Helpers that were fetched may go where they like again; those asleep are woken.
    void call(int want) {
        for (int index = 1; index < want; index++) {
            Helper& helper = helpers_[index];
            if (helper.fetched) sched_setaffinity(helper.id, sizeof anywhere_, &anywhere_);
            helper.fetched = false;
        }
        if (asleep_.load() > threads_ - want) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
    }
    void await(Helper& helper) {
        for (int spins = 0; helper.inside.load(); spins++) {
            if (spins < SPINS) {
                pause();
                continue;
            }
            if (!helper.fetched) {
                cpu_set_t here;
                CPU_ZERO(&here);
                CPU_SET(sched_getcpu(), &here);
                helper.fetched = sched_setaffinity(helper.id, sizeof here, &here) == 0;
            }
            rest();
        }
    }
    void help(int index, int niceness) {
        Helper& self = helpers_[index];
        self.id = int(syscall(SYS_gettid));
        setpriority(PRIO_PROCESS, self.id, niceness);
        while (!ending_) {
            if (!stepping_.load() || index >= wanted_.load()) {
                sleep(index);
                continue;
            }
            self.inside.store(true);  // sequentially consistent, with open_: we see it shut, or run() waits for us
            if (open_.load()) take_part(index);
            self.inside.store(false);
            pause();
        }
    }
    void sleep(int index) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return ending_ || (stepping_.load() && index < wanted_.load()); });
        asleep_.fetch_sub(1);
    }

    Line* table_;
    int lines_, mine_, threads_;
    cpu_set_t anywhere_;
    std::function<void(int64_t, int)> job_;
    int64_t tasks_ = 0, glanced_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<int> wanted_{0}, asleep_{0};
    std::atomic<bool> open_{false}, stepping_{false}, ending_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::vector<float>> scratch_;
    std::vector<Helper> helpers_;
};

}  // namespace tandem
