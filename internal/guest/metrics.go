package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// usage is the answer of /metrics; the names are wire facts.
type usage struct {
	Timestamp   int64   `json:"ts"`
	CPUCount    int     `json:"cpu_count"`
	CPUUsed     float64 `json:"cpu_used_pct"`
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

// sampleGap is the shortest time over which CPU use is computed: the counters
// tick a hundred times a second.
const sampleGap = 200 * time.Millisecond

// metrics measures the guest. CPU use is over the time since the call before,
// and since boot at the first.
type metrics struct {
	proc, root string

	mu          sync.Mutex
	at          time.Time
	busy, total uint64
	used        float64
}

func newMetrics(proc, root string) *metrics { return &metrics{proc: proc, root: root} }

func (s *Server) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	u, err := s.metrics.read(time.Now())
	if err != nil {
		s.opt.Log.Error("read metrics", "err", err)
		writeError(w, http.StatusInternalServerError, err.Error())
		return
	}
	writeJSON(w, http.StatusOK, u)
}

func (s *Server) serveEnvs(w http.ResponseWriter, _ *http.Request) {
	env := s.opt.Identity.Current().Env
	if env == nil {
		env = map[string]string{}
	}
	writeJSON(w, http.StatusOK, env)
}

func (m *metrics) read(now time.Time) (usage, error) {
	stat, err := readProc(filepath.Join(m.proc, "stat"))
	if err != nil {
		return usage{}, err
	}
	busy, total, cpus, err := parseStat(stat)
	if err != nil {
		return usage{}, err
	}
	info, err := readProc(filepath.Join(m.proc, "meminfo"))
	if err != nil {
		return usage{}, err
	}
	mem := parseMeminfo(info)
	var fs unix.Statfs_t
	if err := unix.Statfs(m.root, &fs); err != nil {
		return usage{}, fmt.Errorf("stat file system %s: %w", m.root, err)
	}

	u := usage{Timestamp: now.Unix(), CPUCount: cpus, CPUUsed: m.percent(now, busy, total)}
	u.MemTotal = mem["MemTotal"]
	u.MemCache = mem["Buffers"] + mem["Cached"] + mem["SReclaimable"]
	u.MemUsed = u.MemTotal - min(u.MemTotal, mem["MemFree"]+u.MemCache)
	u.MemTotalMiB, u.MemUsedMiB = u.MemTotal>>20, u.MemUsed>>20
	u.DiskTotal = fs.Blocks * uint64(fs.Bsize)
	u.DiskUsed = (fs.Blocks - min(fs.Blocks, fs.Bfree)) * uint64(fs.Bsize)
	return u, nil
}

func (m *metrics) percent(now time.Time, busy, total uint64) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.at.IsZero() && now.Sub(m.at) < sampleGap {
		return m.used
	}
	// After a restore the counters may be older than the last sample.
	if total > m.total && busy >= m.busy {
		m.used = float64(int(10000*float64(busy-m.busy)/float64(total-m.total))) / 100
	}
	m.at, m.busy, m.total = now, busy, total
	return m.used
}

// readProc reads one of the kernel's files, which are at most a few pages.
func readProc(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}

// parseStat sums the ticks of all CPUs and counts them; see proc_stat(5).
func parseStat(b []byte) (busy, total uint64, cpus int, err error) {
	found := false
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 5 || !bytes.HasPrefix(f[0], []byte("cpu")) {
			continue
		}
		if len(f[0]) > 3 {
			cpus++
			continue
		}
		found = true
		// guest and guest_nice are contained in user and nice.
		for i, v := range f[1:min(len(f), 9)] {
			n, err := strconv.ParseUint(string(v), 10, 64)
			if err != nil {
				return 0, 0, 0, fmt.Errorf("parse /proc/stat: %w", err)
			}
			total += n
			if i != 3 && i != 4 { // idle, iowait
				busy += n
			}
		}
	}
	if !found {
		return 0, 0, 0, errors.New("parse /proc/stat: no cpu line")
	}
	return busy, total, cpus, nil
}

// parseMeminfo reads "Name:  123 kB" lines into bytes.
func parseMeminfo(b []byte) map[string]uint64 {
	m := map[string]uint64{}
	for line := range bytes.Lines(b) {
		name, rest, ok := bytes.Cut(line, []byte(":"))
		f := bytes.Fields(rest)
		if !ok || len(f) == 0 {
			continue
		}
		if n, err := strconv.ParseUint(string(f[0]), 10, 54); err == nil {
			m[string(name)] = n << 10
		}
	}
	return m
}
