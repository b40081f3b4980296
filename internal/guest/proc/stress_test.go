package proc

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/process"
)

// rss is this process's resident memory.
func rss(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n * int64(os.Getpagesize())
}

// TestGigabyteSlowReader reads a gigabyte with pauses: the process must wait
// and nothing may pile up.
func TestGigabyteSlowReader(t *testing.T) {
	total := int64(1 << 30)
	if testing.Short() {
		total = 64 << 20
	}
	r := newRig(t, rigOptions{})
	debug.FreeOSMemory()
	before := rss(t)
	run := r.begin(t, sh(fmt.Sprintf("head -c %d /dev/zero", total)))
	r.mu.Lock()
	p := r.byPID[run.pid]
	r.mu.Unlock()
	var got, peak int64
	next := total / 8
	var end *process.ProcessEvent_EndEvent
	for run.stream.Receive() {
		ev := run.stream.Msg().GetEvent()
		got += int64(len(ev.GetData().GetStdout()))
		if ev.GetEnd() != nil {
			end = ev.GetEnd()
		}
		if got >= next {
			next += total / 8
			// Stop reading until the process is held up.
			full := 0
			for last := int64(-1); full < 3; {
				p.out.mu.Lock()
				now := int64(p.out.first)
				p.out.mu.Unlock()
				if now == last {
					full++
				} else {
					full = 0
				}
				last = now
				time.Sleep(10 * time.Millisecond)
			}
			peak = max(peak, rss(t))
		}
	}
	if err := run.stream.Err(); err != nil || got != total || end.GetExitCode() != 0 {
		t.Fatalf("%d of %d bytes, end %v, err %v", got, total, end, err)
	}
	t.Logf("resident memory %d MiB before, %d MiB at most", before>>20, peak>>20)
	if peak-before > 32<<20 {
		t.Errorf("resident memory grew from %d to %d MiB", before>>20, peak>>20)
	}
}

// TestGigabyteUnread lets a process write with nobody attached: it runs to its
// end and only the tail is kept.
func TestGigabyteUnread(t *testing.T) {
	r := newRig(t, rigOptions{})
	run := r.begin(t, sh("read go; head -c 1000000000 /dev/zero; echo done; exec sleep 1000"))
	r.mu.Lock()
	p := r.byPID[run.pid]
	r.mu.Unlock()
	run.cancel()
	_ = run.stream.Close()
	eventually(t, "the stream is gone", func() bool {
		p.out.mu.Lock()
		defer p.out.mu.Unlock()
		return len(p.out.readers) == 0
	})
	if _, err := r.client.SendInput(t.Context(), connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("\n")})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has written everything", func() bool {
		p.out.mu.Lock()
		defer p.out.mu.Unlock()
		n := len(p.out.segs)
		return n > 0 && strings.HasSuffix(string(p.out.segs[n-1].data), "done\n")
	})
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	if p.out.size > logBytes {
		t.Errorf("log takes %d bytes", p.out.size)
	}
}

// TestThousandProcesses runs as many processes as the agent follows, all at
// one time, and checks every one's output and status.
func TestThousandProcesses(t *testing.T) {
	r := newRig(t, rigOptions{})
	n := 1000
	if testing.Short() || r.max < n {
		n = r.max / 2
	}
	runs := make([]*running, n)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := w; i < n; i += 16 {
				run, err := r.tryBegin(t, connect.NewRequest(sh(fmt.Sprintf("read x; echo out %d $x; echo err %d >&2; exit %d", i, i, i%200))))
				if err != nil {
					t.Errorf("start %d: %v", i, err)
					continue
				}
				runs[i] = run
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	if got := r.listed(t); got != n {
		t.Errorf("%d are listed, want %d", got, n)
	}
	for w := range 16 {
		wg.Go(func() {
			for i := w; i < n; i += 16 {
				req := &process.SendInputRequest{Process: byPID(runs[i].pid), Input: stdinOf(fmt.Sprintf("in%d\n", i))}
				if _, err := r.client.SendInput(t.Context(), connect.NewRequest(req)); err != nil {
					t.Errorf("input %d: %v", i, err)
				}
				res := runs[i].wait()
				if res.err != nil || res.stdout != fmt.Sprintf("out %d in%d\n", i, i) || res.stderr != fmt.Sprintf("err %d\n", i) || res.end.GetExitCode() != int32(i%200) {
					t.Errorf("process %d: %+v", i, res)
				}
			}
		})
	}
	wg.Wait()
	if got := r.listed(t); got != 0 {
		t.Errorf("%d are listed", got)
	}
	r.mu.Lock()
	if r.reserved != 0 || len(r.lingering) > 16 {
		t.Errorf("%d places taken, %d cgroups left", r.reserved, len(r.lingering))
	}
	r.mu.Unlock()
}

// TestFloodOfSmallWrites alternates two streams byte by byte, the worst case
// for a log of segments.
func TestFloodOfSmallWrites(t *testing.T) {
	r := newRig(t, rigOptions{})
	res := r.run(t, sh("i=0; while [ $i -lt 5000 ]; do echo o$i; echo e$i >&2; i=$((i+1)); done"))
	var out, err strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&out, "o%d\n", i)
		fmt.Fprintf(&err, "e%d\n", i)
	}
	if res.err != nil || res.stdout != out.String() || res.stderr != err.String() {
		t.Errorf("%d and %d bytes, %v", len(res.stdout), len(res.stderr), res.err)
	}
}

// TestForkBomb runs one until its deadline: the agent must keep the threads it
// needs to answer, and to kill all of it.
func TestForkBomb(t *testing.T) {
	r := newRig(t, rigOptions{})
	if r.trees.dir == "" || intFile(r.trees.dir+"/pids.max") == 0 {
		t.Skip("missing capability: cgroup v2 with the pids controller")
	}
	req := connect.NewRequest(sh("f() { f | f & }; f; f; sleep 1000"))
	req.Header().Set("Connect-Timeout-Ms", "5000")
	run, err := r.tryBegin(t, req)
	if err != nil {
		t.Fatal(err)
	}
	for alive(int(run.pid)) {
		r.listed(t)
	}
	wantCode(t, run.wait().err, connect.CodeDeadlineExceeded, "")
	eventually(t, "all of it is gone", func() bool {
		b, err := os.ReadFile(r.trees.dir + "/cgroup.events")
		return err == nil && strings.Contains(string(b), "populated 0")
	})
	if res := r.run(t, sh("echo fine")); res.stdout != "fine\n" {
		t.Errorf("%+v", res)
	}
}

// BenchmarkExec is one short command from request to end.
func BenchmarkExec(b *testing.B) {
	r := newRig(b, rigOptions{})
	for b.Loop() {
		if res := r.run(b, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/true"}}); res.end.GetStatus() != "exit status 0" {
			b.Fatalf("%+v", res)
		}
	}
}

// BenchmarkOutput is the throughput of one process's output over HTTP/1.1 on
// loopback.
func BenchmarkOutput(b *testing.B) {
	const size = 256 << 20
	r := newRig(b, rigOptions{})
	b.SetBytes(size)
	for b.Loop() {
		run := r.begin(b, sh(fmt.Sprintf("exec head -c %d /dev/zero", size)))
		n := 0
		for run.stream.Receive() {
			n += len(run.stream.Msg().GetEvent().GetData().GetStdout())
		}
		if n != size {
			b.Fatalf("%d bytes, %v", n, run.stream.Err())
		}
	}
}
