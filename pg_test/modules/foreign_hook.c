/*
 * Somebody else's hook: points TopMemoryContext at a table of its own, whose alloc is not the server's. Loaded before
 * rheap, it must make rheap step aside.
 */
#include "postgres.h"

#include "fmgr.h"
#include "nodes/memnodes.h"
#include "utils/memutils.h"

PG_MODULE_MAGIC;

void		_PG_init(void);

/* The tables from 16 on are one array, of which entry 3 is AllocSet's; copy all of it. */
#if PG_VERSION_NUM >= 160000
#define BEFORE 3
#define TABLES 8
#else
#define BEFORE 0
#define TABLES 1
#endif

static MemoryContextMethods tables[TABLES];
static const MemoryContextMethods *original;

#if PG_VERSION_NUM >= 170000
static void *
foreign_alloc(MemoryContext context, Size size, int flags)
{
	return original->alloc(context, size, flags);
}
#else
static void *
foreign_alloc(MemoryContext context, Size size)
{
	return original->alloc(context, size);
}
#endif

void
_PG_init(void)
{
	original = TopMemoryContext->methods;
	memcpy(tables, original - BEFORE, sizeof(tables));
	tables[BEFORE].alloc = foreign_alloc;
	TopMemoryContext->methods = &tables[BEFORE];
}
