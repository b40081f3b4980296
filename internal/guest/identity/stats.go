package identity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
)

// cpuGap is the least time over which CPU use is computed: the kernel counts in
// hundredths of a second.
const cpuGap = 100 * time.Millisecond

// cpuMeter computes CPU use between two readings.
type cpuMeter struct {
	mu   sync.Mutex
	at   time.Time
	last cpuTimes
	used float64 // percent of all CPUs
}

// cpuTimes are ticks of all CPUs since boot.
type cpuTimes struct{ busy, total uint64 }

// percent returns the use since the reading before, or since boot at the first.
func (m *cpuMeter) percent(now cpuTimes, at time.Time) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.at.IsZero() && at.Sub(m.at) < cpuGap {
		return m.used
	}
	if now.total > m.last.total && now.busy >= m.last.busy {
		m.used = 100 * float64(now.busy-m.last.busy) / float64(now.total-m.last.total)
	}
	m.at, m.last = at, now
	return m.used
}

func (s *Service) stats() (*guestv1.StatsResponse, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return nil, fmt.Errorf("read uptime: %w", err)
	}
	stat, err := readProc("/proc/stat")
	if err != nil {
		return nil, err
	}
	times, cpus, err := parseCPU(stat)
	if err != nil {
		return nil, err
	}
	info, err := readProc("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	mem := parseMeminfo(info)
	var fs unix.Statfs_t
	if err := unix.Statfs(s.opt.Root, &fs); err != nil {
		return nil, fmt.Errorf("stat file system %s: %w", s.opt.Root, err)
	}
	st := &guestv1.StatsResponse{
		UptimeNs:         up.Nano(),
		CpuCount:         uint32(cpus),
		CpuUsedPercent:   s.cpu.percent(times, time.Now()),
		MemoryTotalBytes: mem["MemTotal"],
		MemoryUsedBytes:  max(0, mem["MemTotal"]-mem["MemAvailable"]),
		MemoryCacheBytes: mem["Buffers"] + mem["Cached"] + mem["SReclaimable"],
		DiskTotalBytes:   int64(fs.Blocks) * fs.Bsize,
		DiskUsedBytes:    int64(fs.Blocks-min(fs.Blocks, fs.Bfree)) * fs.Bsize,
		Processes:        countProcesses(),
	}
	if b, err := readProc("/proc/self/statm"); err == nil {
		if f := bytes.Fields(b); len(f) > 1 {
			n, _ := strconv.ParseInt(string(f[1]), 10, 40)
			st.AgentRssBytes = n * int64(os.Getpagesize())
		}
	}
	return st, nil
}

// readProc reads one of the kernel's files, as far as 1 MiB.
func readProc(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}

// parseCPU sums the "cpu" line of proc_stat(5) and counts the "cpuN" lines.
func parseCPU(b []byte) (t cpuTimes, cpus int, err error) {
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 5 || !bytes.HasPrefix(f[0], []byte("cpu")) {
			continue
		}
		if len(f[0]) > 3 {
			cpus++
			continue
		}
		t = cpuTimes{}
		// The columns after the eighth are contained in the first two.
		for i, v := range f[1:min(len(f), 9)] {
			n, err := strconv.ParseUint(string(v), 10, 62)
			if err != nil {
				return t, 0, fmt.Errorf("parse /proc/stat: %w", err)
			}
			t.total += n
			if i != 3 && i != 4 { // idle, iowait
				t.busy += n
			}
		}
	}
	if t.total == 0 {
		return t, 0, errors.New("parse /proc/stat: no cpu line")
	}
	return t, cpus, nil
}

// parseMeminfo reads proc_meminfo(5), in bytes.
func parseMeminfo(b []byte) map[string]int64 {
	m := make(map[string]int64)
	for line := range bytes.Lines(b) {
		name, rest, ok := bytes.Cut(line, []byte(":"))
		f := bytes.Fields(rest)
		if !ok || len(f) == 0 {
			continue
		}
		if n, err := strconv.ParseInt(string(f[0]), 10, 50); err == nil && n >= 0 {
			m[string(name)] = n << 10
		}
	}
	return m
}

// countProcesses counts the processes of the guest.
func countProcesses() uint32 {
	d, err := os.Open("/proc")
	if err != nil {
		return 0
	}
	defer d.Close()
	var n uint32
	for {
		names, err := d.Readdirnames(512)
		for _, s := range names {
			if s[0] >= '1' && s[0] <= '9' {
				n++
			}
		}
		if err != nil {
			return n
		}
	}
}
