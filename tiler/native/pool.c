#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#else
#define RELAX() __asm__ volatile("yield")
#endif

enum {
  SPINS = 64,       // between looks at the clock
  AWAKE = 1000000,  // ns that a thread waits before it sleeps: jobs are some hundreds of µs apart, and waking takes as long
  SHARES = 4,       // a thread takes 1 / (SHARES · threads) of the tasks that are left at a time: neighbours share cache lines
  MOST = 256,
  STACK = 1 << 20
};

typedef struct {
  Task task;
  const void *context;
  int64_t count, shares;
  _Atomic int64_t next;
  int places;  // for further workers; under the lock
} Job;

struct Pool {
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
  Job *job;              // NULL: none to join
  _Atomic int64_t epoch; // counts jobs, so that a spinning worker sees a new one
  _Atomic int64_t active; // workers inside the job; changes under the lock
  atomic_int busy;       // whether a caller has the pool
  int workers, stop;
  pthread_t thread[MOST];
  pid_t pid;  // whose threads these are: a child of fork has none
};

static int64_t nanoseconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Waits up to AWAKE for the counter to equal `value`, or if `is_other` to differ, and offers the processor to other threads.
static void spin(const _Atomic int64_t *counter, int64_t value, int is_other) {
  for (int64_t end = nanoseconds() + AWAKE; nanoseconds() < end; sched_yield())
    for (int i = 0; i < SPINS; i++) {
      if ((atomic_load_explicit(counter, memory_order_relaxed) == value) != is_other) return;
      RELAX();
    }
}

static void take_tasks(Job *job) {
  int64_t first = 0, last;
  for (;;) {
    do {
      if (first >= job->count) return;
      last = first + (job->count - first + job->shares - 1) / job->shares;
    } while (!atomic_compare_exchange_weak_explicit(&job->next, &first, last, memory_order_relaxed, memory_order_relaxed));
    for (; first < last; first++) job->task(job->context, first);
  }
}

static void *work(void *argument) {
  Pool *pool = argument;
  int64_t seen = 0;
  int full = 0;
  for (;;) {
    if (!full) spin(&pool->epoch, seen, 1);  // where threads outnumber tasks, those without a place sleep
    pthread_mutex_lock(&pool->lock);
    while (!pool->stop && atomic_load(&pool->epoch) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
    seen = atomic_load(&pool->epoch);
    Job *job = pool->job;
    full = job && job->places <= 0;
    int joins = job && !full && !pool->stop;
    if (joins) job->places--, pool->active++;
    int stop = pool->stop;
    pthread_mutex_unlock(&pool->lock);
    if (stop) return NULL;
    if (!joins) continue;
    take_tasks(job);
    pthread_mutex_lock(&pool->lock);
    if (--pool->active == 0) pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->lock);
  }
}

static void begin(Pool *pool) {
  pthread_mutex_init(&pool->lock, NULL);
  pthread_cond_init(&pool->wake, NULL);
  pthread_cond_init(&pool->done, NULL);
  pool->job = NULL;
  atomic_store(&pool->epoch, 0);
  atomic_store(&pool->busy, 0);
  atomic_store(&pool->active, 0);
  pool->workers = pool->stop = 0;
  pool->pid = getpid();
}

Pool *pool_open(void) {
  Pool *pool = malloc(sizeof *pool);
  if (pool) begin(pool);
  return pool;
}

void pool_close(Pool *pool) {
  if (pool->pid == getpid()) {
    pthread_mutex_lock(&pool->lock);
    pool->stop = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->workers; i++) pthread_join(pool->thread[i], NULL);
  }
  free(pool);
}

// Workers that cannot be started are done without.
static void grow(Pool *pool, int workers) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK);
  while (pool->workers < workers && pool->workers < MOST) {
    if (pthread_create(&pool->thread[pool->workers], &attributes, work, pool)) break;
    pool->workers++;
  }
  pthread_attr_destroy(&attributes);
}

void pool_run(Pool *pool, Task task, const void *context, int64_t count, int threads) {
  Job job = {.task = task, .context = context, .count = count, .shares = 1, .next = 0};
  if (pool->pid != getpid()) begin(pool);
  int idle = 0;
  if (count < 2 || threads < 2 || !atomic_compare_exchange_strong(&pool->busy, &idle, 1)) {
    take_tasks(&job);
    return;
  }
  int64_t others = (threads < count ? threads : count) - 1;
  grow(pool, (int)others);
  job.places = (int)others;
  job.shares = SHARES * (others + 1);
  pthread_mutex_lock(&pool->lock);
  pool->job = &job;
  pthread_cond_broadcast(&pool->wake);
  atomic_fetch_add(&pool->epoch, 1);  // last: those who see it want the lock
  pthread_mutex_unlock(&pool->lock);
  take_tasks(&job);
  pthread_mutex_lock(&pool->lock);
  pool->job = NULL;
  pthread_mutex_unlock(&pool->lock);
  spin(&pool->active, 0, 0);
  pthread_mutex_lock(&pool->lock);
  while (pool->active) pthread_cond_wait(&pool->done, &pool->lock);
  pthread_mutex_unlock(&pool->lock);
  atomic_store(&pool->busy, 0);
}
