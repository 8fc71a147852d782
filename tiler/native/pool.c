#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#else
#define RELAX() __asm__ volatile("yield")
#endif

enum { SPINS = 4000, MOST = 256, STACK = 1 << 20 };  // spins: some tens of µs before a worker sleeps

typedef struct {
  Task task;
  const void *context;
  int64_t count;
  _Atomic int64_t next;
  int places;  // for further workers; under the lock
} Job;

struct Pool {
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
  Job *job;              // NULL: none to join
  _Atomic int64_t epoch; // counts jobs, so that a spinning worker sees a new one
  atomic_int busy;       // whether a caller has the pool
  int active;            // workers inside the job
  int workers, stop;
  pthread_t thread[MOST];
  pid_t pid;  // whose threads these are: a child of fork has none
};

static void take_tasks(Job *job) {
  for (;;) {
    int64_t number = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
    if (number >= job->count) return;
    job->task(job->context, number);
  }
}

static void *work(void *argument) {
  Pool *pool = argument;
  int64_t seen = 0;
  for (;;) {
    for (int i = 0; i < SPINS && atomic_load_explicit(&pool->epoch, memory_order_relaxed) == seen; i++) RELAX();
    pthread_mutex_lock(&pool->lock);
    while (!pool->stop && atomic_load(&pool->epoch) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
    seen = atomic_load(&pool->epoch);
    Job *job = pool->job;
    int joins = job && job->places > 0 && !pool->stop;
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
  pool->active = pool->workers = pool->stop = 0;
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
  Job job = {.task = task, .context = context, .count = count, .next = 0};
  if (pool->pid != getpid()) begin(pool);
  int idle = 0;
  if (count < 2 || threads < 2 || !atomic_compare_exchange_strong(&pool->busy, &idle, 1)) {
    take_tasks(&job);
    return;
  }
  int64_t others = (threads < count ? threads : count) - 1;
  grow(pool, (int)others);
  job.places = (int)others;
  pthread_mutex_lock(&pool->lock);
  pool->job = &job;
  atomic_fetch_add(&pool->epoch, 1);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->lock);
  take_tasks(&job);
  pthread_mutex_lock(&pool->lock);
  pool->job = NULL;
  while (pool->active) pthread_cond_wait(&pool->done, &pool->lock);
  pthread_mutex_unlock(&pool->lock);
  atomic_store(&pool->busy, 0);
}
