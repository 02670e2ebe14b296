/* What the processor can do: the loops a person would write by hand for one case each, compiled on the spot with
 * -march=native. They are limits to be held against, not programs to be used: no statuses, no losses, no checks.
 *
 * Everything works on blocks of LANES problems, written as loops over the lanes that the compiler turns into vector
 * registers. POINTS and WEIGHTS (the size of a vector problem) are fixed when this file is compiled. */
#include <math.h>
#include <pthread.h>
#include <string.h>

#define VECTOR 16                      /* floats in one register of 512 bits */
#define REGISTERS 8                    /* enough independent chains to hide the latency of a multiply-add */
#define LANES (VECTOR * REGISTERS)
#define CHAINS 12                      /* of the loop that does nothing else; a few more than the latency needs */
#ifndef POINTS
#define POINTS 16
#define WEIGHTS 4
#endif

typedef float lanes __attribute__((vector_size(VECTOR * sizeof(float))));

/* ---- threads: each takes one contiguous share of the blocks ------------------------------------------------- */

typedef struct job {
    void (*work)(const struct job *, long first, long last);
    const float *x, *t, *r, *w0, *table;
    float *w;
    long problems, steps, first, last;
} job;

static void *enter(void *argument) {
    job *mine = argument;
    mine->work(mine, mine->first, mine->last);
    return 0;
}

static void share_out(job task, long blocks, int threads) {
    pthread_t handles[256];
    job parts[256];
    if (threads > 256) threads = 256;
    for (int i = 0; i < threads; i++) {
        parts[i] = task;
        parts[i].first = blocks * i / threads;
        parts[i].last = blocks * (i + 1) / threads;
        if (i) pthread_create(&handles[i], 0, enter, &parts[i]);
    }
    enter(&parts[0]);
    for (int i = 1; i < threads; i++) pthread_join(handles[i], 0);
}

/* a block of the flat array `from`, its end padded with zeros where the batch ends */
static void load(lanes *to, const float *from, long block, long problems) {
    long start = block * LANES, count = problems - start < LANES ? problems - start : LANES;
    memset(to, 0, LANES * sizeof(float));
    memcpy(to, from + start, count * sizeof(float));
}

static void store(float *to, const lanes *from, long block, long problems) {
    long start = block * LANES, count = problems - start < LANES ? problems - start : LANES;
    memcpy(to + start, from, count * sizeof(float));
}

/* ---- scalar problems, 0.5 (t - x w)^2: two multiply-adds per step ------------------------------------------- */

static void scalar_blocks(const job *task, long first, long last) {
    for (long block = first; block < last; block++) {
        lanes x[REGISTERS], t[REGISTERS], rx[REGISTERS], w[REGISTERS];
        load(x, task->x, block, task->problems);
        load(t, task->t, block, task->problems);
        load(rx, task->r, block, task->problems);
        load(w, task->w0, block, task->problems);
        for (int i = 0; i < REGISTERS; i++) rx[i] *= x[i];
        for (long step = 0; step < task->steps; step++)
            for (int i = 0; i < REGISTERS; i++) w[i] += rx[i] * (t[i] - x[i] * w[i]);
        store(task->w, w, block, task->problems);
    }
}

void scalar(const float *x, const float *t, const float *r, const float *w0, float *w, long problems, long steps,
            int threads) {
    job task = {scalar_blocks, x, t, r, w0, 0, w, problems, steps, 0, 0};
    share_out(task, (problems + LANES - 1) / LANES, threads);
}

/* ---- the same with Adam; table[2 s], table[2 s + 1] are 1/(1 - b1^s) and 1/(1 - b2^s) ------------------------ */

static void adam_blocks(const job *task, long first, long last) {
    const float b1 = 0.9f, b2 = 0.999f, c1 = 0.1f, c2 = 0.001f, eps = 1e-8f;
    for (long block = first; block < last; block++) {
        lanes x[REGISTERS], t[REGISTERS], r[REGISTERS], w[REGISTERS], m[REGISTERS] = {0}, v[REGISTERS] = {0};
        load(x, task->x, block, task->problems);
        load(t, task->t, block, task->problems);
        load(r, task->r, block, task->problems);
        load(w, task->w0, block, task->problems);
        for (long step = 0; step < task->steps; step++) {
            const float first = task->table[2 * step], second = task->table[2 * step + 1];
            for (int i = 0; i < REGISTERS; i++) {
                lanes g = (x[i] * w[i] - t[i]) * x[i], root;
                m[i] = b1 * m[i] + c1 * g;
                v[i] = b2 * v[i] + c2 * (g * g);
                root = v[i] * second;
                for (int j = 0; j < VECTOR; j++) root[j] = sqrtf(root[j]);
                w[i] -= r[i] * (m[i] * first) / (root + eps);
            }
        }
        store(task->w, w, block, task->problems);
    }
}

void adam(const float *x, const float *t, const float *r, const float *w0, float *w, const float *table,
          long problems, long steps, int threads) {
    job task = {adam_blocks, x, t, r, w0, table, w, problems, steps, 0, 0};
    share_out(task, (problems + LANES - 1) / LANES, threads);
}

/* ---- vector problems with their own data, 0.5 mean((t - x @ w)^2): x is [problems, POINTS, WEIGHTS] ---------- */

static void vector_blocks(const job *task, long first, long last) {
    static __thread lanes x[POINTS][WEIGHTS], t[POINTS];
    for (long block = first; block < last; block++) {
        lanes w[WEIGHTS], r = {0};
        long start = block * VECTOR, count = task->problems - start < VECTOR ? task->problems - start : VECTOR;
        memset(x, 0, sizeof x);
        memset(t, 0, sizeof t);
        memset(w, 0, sizeof w);
        for (long lane = 0; lane < count; lane++) {
            long problem = start + lane;
            for (int p = 0; p < POINTS; p++) {
                for (int k = 0; k < WEIGHTS; k++) x[p][k][lane] = task->x[(problem * POINTS + p) * WEIGHTS + k];
                t[p][lane] = task->t[problem * POINTS + p];
            }
            for (int k = 0; k < WEIGHTS; k++) w[k][lane] = task->w0[problem * WEIGHTS + k];
            r[lane] = task->r[problem] / POINTS;
        }
        for (long step = 0; step < task->steps; step++) {
            lanes g[WEIGHTS];
            memset(g, 0, sizeof g);
            for (int p = 0; p < POINTS; p++) {
                lanes residual = t[p];
                for (int k = 0; k < WEIGHTS; k++) residual -= x[p][k] * w[k];
                for (int k = 0; k < WEIGHTS; k++) g[k] += x[p][k] * residual;
            }
            for (int k = 0; k < WEIGHTS; k++) w[k] += r * g[k];
        }
        for (long lane = 0; lane < count; lane++)
            for (int k = 0; k < WEIGHTS; k++) task->w[(start + lane) * WEIGHTS + k] = w[k][lane];
    }
}

void vector(const float *x, const float *t, const float *r, const float *w0, float *w, long problems, long steps,
            int threads) {
    job task = {vector_blocks, x, t, r, w0, 0, w, problems, steps, 0, 0};
    share_out(task, (problems + VECTOR - 1) / VECTOR, threads);
}

/* ---- multiply-adds and nothing else: `steps` times CHAINS * VECTOR of them per block ----------------------------------- */

static void peak_blocks(const job *task, long first, long last) {
    lanes a, b, sum = {0};
    memcpy(&a, task->x, sizeof a);
    memcpy(&b, task->t, sizeof b);
    for (long block = first; block < last; block++) {
        lanes chain[CHAINS];
        for (int i = 0; i < CHAINS; i++) chain[i] = a * (float)i;
        for (long step = 0; step < task->steps; step++)
            for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * a + b;
        for (int i = 0; i < CHAINS; i++) sum += chain[i];
    }
    for (int i = 0; i < VECTOR; i++) task->w[first + i] = sum[i];
}

void peak(const float *ab, float *out, long blocks, long steps, int threads) {
    job task = {peak_blocks, ab, ab + VECTOR, 0, 0, 0, out, 0, steps, 0, 0};
    share_out(task, blocks, threads);
}
