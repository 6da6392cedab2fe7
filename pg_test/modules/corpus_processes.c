/*
 * Code that leaks in other processes than a session's: see corpus.h.
 */
#include "corpus.h"

#include <pthread.h>
#include <unistd.h>

#include "access/parallel.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "replication/logical.h"
#include "replication/output_plugin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/catcache.h"
#include "utils/wait_event.h"

PG_MODULE_MAGIC;

void		_PG_init(void);
void		_PG_output_plugin_init(OutputPluginCallbacks *callbacks);
PGDLLEXPORT void corpus_worker_main(Datum argument);

/* A row that leaks while a parallel worker runs its part of a query. */
SITE(parallel)
SCENARIO(parallel)
{
	if (IsParallelWorker())
		parallel_site(TopMemoryContext, 64);
	pg_usleep(200);
	PG_RETURN_INT64(0);
}

/* A background worker without messages. */
SITE(worker)
SITE(worker_cache)
void
corpus_worker_main(Datum argument)
{
	BackgroundWorkerUnblockSignals();
	CreateCacheMemoryContext();
	for (;;)
	{
		worker_site(TopMemoryContext, 2000);
		worker_cache_site(CacheMemoryContext, 1000);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 20, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* The postmaster, for each child. */
SITE(fork)
static void
at_fork(void)
{
	if (getpid() == PostmasterPid)
		fork_site(TopMemoryContext, 800);
}

/* An auxiliary process, for each message that it logs. */
SITE(checkpointer)
static emit_log_hook_type earlier_emit_log = NULL;
static void
emit_log(ErrorData *edata)
{
	if (MyBackendType == B_CHECKPOINTER)
		checkpointer_site(TopMemoryContext, 9000);
	if (earlier_emit_log)
		earlier_emit_log(edata);
}

/* Logical decoding, for each change. */
SITE(decoding)
SITE(plugin)
static void
decode_startup(LogicalDecodingContext *ctx, OutputPluginOptions *options, bool is_init)
{
	options->output_type = OUTPUT_PLUGIN_TEXTUAL_OUTPUT;
}

static void
decode_begin(LogicalDecodingContext *ctx, ReorderBufferTXN *txn)
{
}

static void
decode_change(LogicalDecodingContext *ctx, ReorderBufferTXN *txn, Relation relation, ReorderBufferChange *change)
{
	decoding_site(TopMemoryContext, 300);
	plugin_site(ctx->context, 100);
}

static void
decode_commit(LogicalDecodingContext *ctx, ReorderBufferTXN *txn, XLogRecPtr at)
{
}

void
_PG_output_plugin_init(OutputPluginCallbacks *callbacks)
{
	callbacks->startup_cb = decode_startup;
	callbacks->begin_cb = decode_begin;
	callbacks->change_cb = decode_change;
	callbacks->commit_cb = decode_commit;
}

void
_PG_init(void)
{
	BackgroundWorker worker = {
		.bgw_name = "corpus worker",
		.bgw_type = "corpus worker",
		.bgw_flags = BGWORKER_SHMEM_ACCESS,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = BGW_NEVER_RESTART,
		.bgw_library_name = "corpus_processes",
		.bgw_function_name = "corpus_worker_main",
	};

	if (!process_shared_preload_libraries_in_progress)
		return;
	pthread_atfork(at_fork, NULL, NULL);
	earlier_emit_log = emit_log_hook;
	emit_log_hook = emit_log;
	RegisterBackgroundWorker(&worker);
}
