// Two callers of one pool: every task of every job must have run once, and be seen to have when the call returns.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../tiler/native/pool.h"

enum { MOST_TASKS = 70, MOST_THREADS = 5, ROUNDS = 20 };

static Pool *pool;

static void run_once(const void *runs, int64_t number) { ((int *)runs)[number]++; }

static void *call(void *unused) {
  for (int round = 0; round < ROUNDS; round++)
    for (int threads = 1; threads <= MOST_THREADS; threads++)
      for (int count = 0; count <= MOST_TASKS; count++) {
        int runs[MOST_TASKS + 1] = {0};
        pool_run(pool, run_once, runs, count, threads);
        for (int i = 0; i <= MOST_TASKS; i++)
          if (runs[i] != (i < count)) {
            printf("task %d of %d on %d threads ran %d times\n", i, count, threads, runs[i]);
            exit(1);
          }
      }
  return unused;
}

int main(void) {
  pthread_t other;
  if (!(pool = pool_open()) || pthread_create(&other, NULL, call, NULL)) return 2;
  call(NULL);
  pthread_join(other, NULL);
  pool_close(pool);
}
