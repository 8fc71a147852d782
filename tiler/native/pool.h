// Threads that take numbered tasks.
#ifndef TILER_POOL_H
#define TILER_POOL_H
#include <stdint.h>

typedef struct Pool Pool;
typedef void (*Task)(const void *context, int64_t number);

Pool *pool_open(void);  // NULL: no memory
void pool_close(Pool *);

// Runs tasks 0 … count − 1 on up to `threads` threads, the caller among them, and returns when all are done. Only workers that
// have joined are waited for: one that the system has not scheduled delays nobody. A second caller meanwhile does its tasks
// alone. Workers stay awake for a millisecond after a job.
void pool_run(Pool *, Task task, const void *context, int64_t count, int threads);

#endif
