package guest

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

const stat0 = `cpu  100 0 100 700 100 0 0 0 50 0
cpu0 50 0 50 350 50 0 0 0 0 0
cpu1 50 0 50 350 50 0 0 0 0 0
intr 1 2 3
`

const stat1 = `cpu  200 0 150 750 100 0 0 0 50 0
cpu0 1 0 0 0 0 0 0 0 0 0
`

const meminfo = `MemTotal:        2048000 kB
MemFree:         1024000 kB
MemAvailable:    1500000 kB
Buffers:           24000 kB
Cached:           400000 kB
SReclaimable:     100000 kB
HugePages_Total:       0
Odd line
Bad:             x kB
`

func TestMetrics(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("stat", stat0)
	write("meminfo", meminfo)
	m := newMetrics(dir, dir)
	now := time.Unix(1_700_000_000, 0)
	u, err := m.read(now)
	if err != nil {
		t.Fatal(err)
	}
	if u.Timestamp != now.Unix() || u.CPUCount != 2 || u.CPUUsed != 20 {
		t.Errorf("%+v", u)
	}
	if u.MemTotal != 2048000<<10 || u.MemCache != 524000<<10 || u.MemUsed != 500000<<10 || u.MemTotalMiB != 2000 || u.MemUsedMiB != 488 {
		t.Errorf("%+v", u)
	}
	if u.DiskTotal == 0 || u.DiskUsed > u.DiskTotal {
		t.Errorf("%+v", u)
	}
	write("stat", stat1)
	if u, err = m.read(now.Add(sampleGap / 2)); err != nil || u.CPUUsed != 20 {
		t.Errorf("too soon: %v, %v", u.CPUUsed, err)
	}
	if u, err = m.read(now.Add(2 * sampleGap)); err != nil || u.CPUUsed != 75 {
		t.Errorf("over the interval: %v, %v", u.CPUUsed, err)
	}
	write("stat", stat0)
	if u, err = m.read(now.Add(4 * sampleGap)); err != nil || u.CPUUsed != 75 {
		t.Errorf("counters that go back: %v, %v", u.CPUUsed, err)
	}
	for _, bad := range []string{"", "cpu  1 x 3 4 5\n", "intr 1 2 3 4 5\n"} {
		write("stat", bad)
		if _, err := m.read(now); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
