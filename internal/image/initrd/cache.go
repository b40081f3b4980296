package initrd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	suffix    = ".cpio"
	tmpPrefix = ".tmp-"
	// keepRecent archives survive pruning, however old: the kernels of a store
	// in turn with one agent each.
	keepRecent = 4
	// pruneAge is how long an archive must have gone unused. A machine that is
	// about to start has just been given its path, and QEMU reads it at once.
	pruneAge = time.Hour
)

// Cache keeps archives in one directory, each under the digest of what it was
// made from. It is safe for concurrent use by one process; the directory must
// not be shared by two. Only what it named itself does it remove.
type Cache struct {
	dir string
	log *slog.Logger
	now func() time.Time

	mu    sync.Mutex // held while making an archive: two callers make one
	agent agentSum
}

// agentSum remembers the digest of an agent binary by what stat says of it.
type agentSum struct {
	path   string
	size   int64
	mtime  time.Time
	digest string
}

// OpenCache returns the cache in dir, which it creates.
func OpenCache(dir string, log *slog.Logger) (*Cache, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("open initrd cache: %w", err)
	}
	return &Cache{dir: dir, log: log, now: time.Now}, nil
}

// Path returns the path of the archive of c, making it if it is not there. The
// file is complete whenever it exists: it is written under a temporary name,
// synced and renamed. Archives that were not asked for lately are removed.
func (c *Cache) Path(ctx context.Context, want Contents) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return "", err
	}
	key, err := c.key(want)
	if err != nil {
		return "", fmt.Errorf("make initrd: %w", err)
	}
	path := filepath.Join(c.dir, key+suffix)
	now := c.now()
	// The time of last use is kept in the file's own times; when that fails
	// (a read-only store) only pruning is the poorer for it.
	if err := os.Chtimes(path, now, now); err == nil {
		return path, nil
	} else if _, serr := os.Stat(path); serr == nil {
		return path, nil
	}
	if err := c.write(path, want, key); err != nil {
		return "", fmt.Errorf("make initrd: %w", err)
	}
	c.prune(path)
	return path, nil
}

func (c *Cache) write(path string, want Contents, key string) (err error) {
	f, err := os.CreateTemp(c.dir, tmpPrefix+"*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	// QEMU may run as another user than the daemon.
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := Write(f, want); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	// An agent that was being rebuilt meanwhile must not sit under the old
	// one's digest.
	if now, err := c.key(want); err != nil {
		return err
	} else if now != key {
		return fmt.Errorf("%s changed while it was being read", want.Agent)
	}
	return os.Rename(f.Name(), path)
}

func (c *Cache) key(want Contents) (string, error) {
	agent, err := c.agentDigest(want.Agent)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintf(h, "format %d\nagent %s\n", formatVersion, agent)
	for _, m := range want.Modules {
		fmt.Fprintf(h, "module %q %s\n", m.Name, m.Digest)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// agentDigest hashes the agent once for as long as stat says it is the same.
func (c *Cache) agentDigest(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("agent: %w", err)
	}
	if a := c.agent; a.path == path && a.size == st.Size() && a.mtime.Equal(st.ModTime()) {
		return a.digest, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("agent: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("agent: %w", err)
	}
	c.agent = agentSum{path, st.Size(), st.ModTime(), hex.EncodeToString(h.Sum(nil))}
	return c.agent.digest, nil
}

// prune removes archives beyond the keepRecent last used and temporary files of
// a crash, as far as they are older than pruneAge. It spares keep.
func (c *Cache) prune(keep string) {
	ents, err := os.ReadDir(c.dir)
	if err != nil {
		c.log.Warn("list initrd cache", "err", err)
		return
	}
	type old struct {
		path string
		used time.Time
	}
	var archives, doomed []old
	for _, e := range ents {
		fi, err := e.Info()
		if err != nil || !fi.Mode().IsRegular() {
			continue
		}
		o := old{filepath.Join(c.dir, e.Name()), fi.ModTime()}
		switch {
		case o.path == keep:
		case strings.HasPrefix(e.Name(), tmpPrefix):
			doomed = append(doomed, o)
		case strings.HasSuffix(e.Name(), suffix):
			archives = append(archives, o)
		}
	}
	slices.SortFunc(archives, func(a, b old) int { return b.used.Compare(a.used) })
	if len(archives) > keepRecent-1 {
		doomed = append(doomed, archives[keepRecent-1:]...)
	}
	for _, o := range doomed {
		if c.now().Sub(o.used) < pruneAge {
			continue
		}
		if err := os.Remove(o.path); err != nil {
			c.log.Warn("prune initrd cache", "err", err)
		}
	}
}
