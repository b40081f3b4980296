package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/agentiso/agentiso/api/process"
)

func (o *output) add(t *testing.T, k kind, s string) {
	t.Helper()
	b := buffers.Get().(*[chunkSize]byte)
	if err := o.append(k, b, copy(b[:], s)); err != nil {
		t.Fatal(err)
	}
}

// readAll takes everything until the end, size bytes at a time.
func readAll(r *reader, size int, bufs *[3]bytes.Buffer) error {
	for {
		p, err := r.take()
		switch {
		case err != nil:
			return err
		case p.end != nil:
			return nil
		case p.data == nil:
			<-r.more
		default:
			n := min(size, len(p.data))
			bufs[p.kind].Write(p.data[:n])
			r.taken(n)
		}
	}
}

// TestOutputManyReaders checks that readers of every speed get each stream
// whole and in order, and that the log never exceeds its bound.
func TestOutputManyReaders(t *testing.T) {
	o := newOutput()
	sizes := []int{1 << 20, 1000, 70, 65536}
	got := make([][3]bytes.Buffer, len(sizes))
	var wg sync.WaitGroup
	for i, size := range sizes {
		r, err := o.attach(false)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if err := readAll(r, size, &got[i]); err != nil {
				t.Errorf("reader %d: %v", i, err)
			}
			o.detach(r, io.EOF)
		})
	}
	var want [2]bytes.Buffer
	var writers sync.WaitGroup
	for k := range want {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(k)))
			for i := 0; want[k].Len() < 4<<20; i++ {
				n := 1 + rnd.IntN(200)
				if i%16 == 0 {
					n = 1 + rnd.IntN(chunkSize)
				}
				s := strings.Repeat(fmt.Sprintf("%d.", i), n)[:n]
				want[k].WriteString(s)
				o.add(t, kind(k), s)
				o.mu.Lock()
				if o.size > logBytes {
					t.Errorf("log takes %d bytes", o.size)
				}
				o.mu.Unlock()
			}
		})
	}
	writers.Wait()
	o.finish(&process.ProcessEvent_EndEvent{})
	wg.Wait()
	for i := range got {
		for k := range want {
			if !bytes.Equal(got[i][k].Bytes(), want[k].Bytes()) {
				t.Errorf("reader %d, stream %d: %d bytes, want %d", i, k, got[i][k].Len(), want[k].Len())
			}
		}
	}
}

func TestOutputWithoutReadersKeepsTheTail(t *testing.T) {
	o := newOutput()
	var all strings.Builder
	for i := range 20000 {
		s := fmt.Sprintf("line %d\n", i)
		all.WriteString(s)
		o.add(t, kind(i/7%2), s)
	}
	o.finish(&process.ProcessEvent_EndEvent{})
	if o.size > logBytes {
		t.Errorf("log takes %d bytes", o.size)
	}
	r, err := o.attach(true)
	if err != nil {
		t.Fatal(err)
	}
	var tail strings.Builder
	for {
		p, err := r.take()
		if err != nil {
			t.Fatal(err)
		}
		if p.data == nil {
			break
		}
		tail.Write(p.data)
		r.taken(len(p.data))
	}
	if tail.Len() < 16<<10 || !strings.HasSuffix(all.String(), tail.String()) {
		t.Errorf("%d bytes are kept: %.40q", tail.Len(), tail.String())
	}
	late, err := o.attach(false)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := late.take(); err != nil || p.end == nil || p.data != nil {
		t.Errorf("a reader after the end: %v, %v", p, err)
	}
}

func TestOutputSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		slow, _ := o.attach(false)
		fast, _ := o.attach(false)
		var got [3]bytes.Buffer
		done := make(chan error, 1)
		go func() { done <- readAll(fast, 1<<20, &got) }()
		begin := time.Now()
		for range 100 {
			o.add(t, stdout, strings.Repeat("x", chunkSize))
		}
		o.finish(&process.ProcessEvent_EndEvent{})
		if err := <-done; err != nil || got[stdout].Len() != 100*chunkSize {
			t.Errorf("fast reader: %v, %d bytes", err, got[stdout].Len())
		}
		if _, err := slow.take(); !errors.Is(err, errSlowReader) {
			t.Errorf("slow reader: %v", err)
		}
		if d := time.Since(begin); d < slowReader || d > 2*slowReader {
			t.Errorf("it was detached after %v", d)
		}
	})
}

// A reader that nobody else waits for may be as slow as it likes, and holds
// the process up.
func TestOutputOnlyReaderIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		r, _ := o.attach(false)
		written := 0
		go func() {
			for range 10 {
				o.add(t, stdout, strings.Repeat("x", chunkSize))
				written++
			}
			o.finish(&process.ProcessEvent_EndEvent{})
		}()
		time.Sleep(10 * slowReader)
		synctest.Wait()
		if written*chunkSize > logBytes {
			t.Errorf("%d chunks were written", written)
		}
		var got [3]bytes.Buffer
		if err := readAll(r, 1<<20, &got); err != nil || got[stdout].Len() != 10*chunkSize {
			t.Errorf("%v, %d bytes", err, got[stdout].Len())
		}
	})
}

func TestOutputClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		r, _ := o.attach(false)
		failed := make(chan error, 1)
		go func() {
			for {
				b := buffers.Get().(*[chunkSize]byte)
				if err := o.append(stdout, b, chunkSize); err != nil {
					failed <- err
					return
				}
			}
		}()
		synctest.Wait()
		o.close()
		if err := <-failed; !errors.Is(err, errOutputClosed) {
			t.Errorf("append: %v", err)
		}
		if _, err := r.take(); !errors.Is(err, errOutputClosed) {
			t.Errorf("take: %v", err)
		}
	})
}

func TestOutputTooManyReaders(t *testing.T) {
	o := newOutput()
	for range maxReaders {
		if _, err := o.attach(false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.attach(false); !errors.Is(err, errTooManyReaders) {
		t.Errorf("err %v", err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (a) b) S 1 2 3 4"))
	f.Add([]byte("12 (x"))
	f.Add([]byte(") R 1 2 -3"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, state := parseStat(b); s < 0 || s > 0 && state == 0 {
			t.Errorf("%d %c", s, state)
		}
	})
}
