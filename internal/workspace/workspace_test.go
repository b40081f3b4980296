package workspace

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

func mustCreate(t *testing.T, s *Service, o CreateOptions) *domain.Workspace {
	t.Helper()
	w, _, err := s.Create(t.Context(), o)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	return w
}

func TestCreateHandsOverARunningWorkspace(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	w, timings, err := s.Create(t.Context(), CreateOptions{
		Name: "a", Env: map[string]string{"BOTH": "user"}, MemoryMiB: 512,
	})
	if err != nil {
		t.Fatal(err)
	}
	if w.State != domain.Running || w.Machine.PID == 0 || w.UID != 1000 || w.Hostname != "ws-"+w.ID {
		t.Errorf("record is %+v", w)
	}
	if diff := cmp.Diff(map[string]string{"FROM": "image", "BOTH": "user"}, w.Env); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	var steps []string
	for _, st := range timings.Steps {
		steps = append(steps, st.Name)
	}
	for _, want := range []string{"disk", "network", "machine", "boot", "configure", "record"} {
		if !strings.Contains(strings.Join(steps, " "), want) {
			t.Errorf("steps %v lack %s", steps, want)
		}
	}
	if timings.Start != "cold" || timings.Total <= 0 {
		t.Errorf("timings are %+v", timings)
	}
}

func TestCreateLeavesNothingBehind(t *testing.T) {
	for _, effect := range []string{"insert", "disk", "own", "network", "machine", "link", "update running"} {
		t.Run(effect, func(t *testing.T) {
			world := newWorld()
			s, _ := world.daemon(t, nil)
			world.failAt = effect
			if _, _, err := s.Create(t.Context(), CreateOptions{Name: "a"}); !errors.Is(err, errInjected) {
				t.Fatalf("create: %v, want the injected error", err)
			}
			wantLeft(t, world)
			world.failAt = ""
			mustCreate(t, s, CreateOptions{Name: "a"}) // the name is free again
		})
	}
}

// wantLeft checks that exactly want is left in the world.
func wantLeft(t *testing.T, w *world, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, w.left()); diff != "" {
		t.Errorf("left behind (-want +got):\n%s", diff)
	}
}

func TestCreateUndoesWhenTheCallerHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		world := newWorld()
		s, _ := world.daemon(t, nil)
		world.guestDead = true
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error)
		go func() {
			_, _, err := s.Create(ctx, CreateOptions{})
			got <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Errorf("create: %v, want canceled", err)
		}
		wantLeft(t, world)
	})
}

func TestBootFailureShowsTheConsole(t *testing.T) {
	t.Run("silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			world := newWorld()
			world.guestDead = true
			s, _ := world.daemon(t, nil)
			_, _, err := s.Create(t.Context(), CreateOptions{Name: "a"})
			wantFault(t, err, fault.BootFailed, "did not answer within 5s", "| [31mno init found[0m")
			wantLeft(t, world)
		})
	})
	t.Run("ended", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			world := newWorld()
			world.guestDead = true
			s, _ := world.daemon(t, nil)
			got := make(chan error)
			go func() {
				_, _, err := s.Create(t.Context(), CreateOptions{Name: "a"})
				got <- err
			}()
			synctest.Wait()
			for _, w := range s.list() {
				world.dies(w.ID, domain.Exit{Reason: "guest panicked"})
			}
			wantFault(t, <-got, fault.BootFailed, "its machine ended: guest panicked", "no init found")
			wantLeft(t, world)
		})
	})
}

func wantFault(t *testing.T, err error, k fault.Kind, texts ...string) {
	t.Helper()
	if !fault.Is(err, k) {
		t.Fatalf("error is %v, want kind %s", err, k)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q lacks %q", err, text)
		}
	}
	if k != fault.Canceled && fault.As(err).Next == "" {
		t.Errorf("error %q has no next step", err)
	}
}

func TestConfigureIsRepeatedWhenTheLinkDrops(t *testing.T) {
	world := newWorld()
	world.drops = 2
	s, _ := world.daemon(t, nil)
	mustCreate(t, s, CreateOptions{})
	if world.configures != 3 {
		t.Errorf("configured %d times, want 3", world.configures)
	}
}

func TestRefusedIdentityIsNotHandedOver(t *testing.T) {
	world := newWorld()
	world.refuse = errors.New("random_seed: cannot reseed")
	s, _ := world.daemon(t, nil)
	_, _, err := s.Create(t.Context(), CreateOptions{})
	wantFault(t, err, fault.BootFailed, "random_seed: cannot reseed")
	wantLeft(t, world)
}

func TestLimits(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    CreateOptions
		kind fault.Kind
	}{
		{"cpus", CreateOptions{CPUs: 5}, fault.Limit},
		{"memory over", CreateOptions{MemoryMiB: 4097}, fault.Limit},
		{"memory under", CreateOptions{MemoryMiB: 64}, fault.Limit},
		{"disk", CreateOptions{DiskBytes: 11 << 30}, fault.Limit},
		{"name", CreateOptions{Name: "A b"}, fault.Invalid},
		{"long name", CreateOptions{Name: strings.Repeat("a", 64)}, fault.Invalid},
		{"init", CreateOptions{Init: "systemd"}, fault.Invalid},
		{"image", CreateOptions{Image: "missing"}, fault.NotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			world := newWorld()
			s, _ := world.daemon(t, nil)
			_, _, err := s.Create(t.Context(), tt.o)
			if !fault.Is(err, tt.kind) {
				t.Errorf("create: %v, want kind %s", err, tt.kind)
			}
			wantLeft(t, world)
		})
	}
}

func TestRacingCreatesDoNotShareTheLastPlace(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	for range 9 {
		mustCreate(t, s, CreateOptions{})
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for range 8 {
		wg.Go(func() {
			_, _, err := s.Create(t.Context(), CreateOptions{Name: "last"})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case !fault.Is(err, fault.Limit) && !fault.Is(err, fault.NameTaken):
				t.Errorf("create: %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 || len(world.records) != 10 {
		t.Errorf("%d creates won and %d records exist, want 1 and 10", won, len(world.records))
	}
}

func TestNames(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	a := mustCreate(t, s, CreateOptions{Name: "a"})
	b := mustCreate(t, s, CreateOptions{Name: "b"})
	for _, ref := range []string{"a", a.ID, a.ID[:7], strings.ToUpper(a.ID[:7])} {
		if got, err := s.Get(t.Context(), ref); err != nil || got.ID != a.ID {
			t.Errorf("get %q: %v, %v", ref, got, err)
		}
	}
	_, err := s.Get(t.Context(), "nobody")
	wantFault(t, err, fault.NotFound, `"nobody"`)
	_, err = s.Get(t.Context(), "")
	wantFault(t, err, fault.NotFound)
	_, _, err = s.Create(t.Context(), CreateOptions{Name: "a"})
	wantFault(t, err, fault.NameTaken, "named a exists already")
	_, err = s.Rename(t.Context(), "b", "a")
	wantFault(t, err, fault.NameTaken)
	if got, err := s.Rename(t.Context(), "b", "c"); err != nil || got.Name != "c" || got.ID != b.ID {
		t.Errorf("rename: %v, %v", got, err)
	}
	s.mu.Lock() // two ids that share a prefix
	for _, id := range []string{"zz000001", "zz000002"} {
		s.entries[id] = newEntry(&domain.Workspace{ID: id, Name: "n" + id})
	}
	s.mu.Unlock()
	_, err = s.Get(t.Context(), "zz")
	wantFault(t, err, fault.Ambiguous, "zz000001 (nzz000001), zz000002 (nzz000002)")
}

func TestStopStartDestroy(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	w := mustCreate(t, s, CreateOptions{Name: "a"})
	slot := w.Slot
	stopped, err := s.Stop(t.Context(), "a", false)
	if err != nil || stopped.State != domain.Stopped || stopped.Machine.PID != 0 {
		t.Fatalf("stop: %+v, %v", stopped, err)
	}
	wantLeft(t, world, "console "+w.ID, "disk "+w.ID, "record "+w.ID+" stopped")
	_, _, err = s.Agent(t.Context(), "a")
	wantFault(t, err, fault.WrongState, "is stopped, not running")
	started, _, err := s.Start(t.Context(), "a")
	if err != nil || started.State != domain.Running {
		t.Fatalf("start: %+v, %v", started, err)
	}
	if diff := cmp.Diff(slot.MAC, started.Slot.MAC); diff != "" {
		t.Errorf("the slot changed: %s", diff)
	}
	_, _, err = s.Start(t.Context(), "a")
	wantFault(t, err, fault.WrongState, "is running and cannot become starting")
	if _, err := s.Destroy(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, world)
	_, err = s.Destroy(t.Context(), "a")
	wantFault(t, err, fault.NotFound)
}

func TestStopIsNotCutShort(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	w := mustCreate(t, s, CreateOptions{Name: "a"})
	ctx, cancel := context.WithCancel(t.Context())
	world.onShutdown = cancel
	if _, err := s.Stop(ctx, "a", false); err != nil {
		t.Fatal(err)
	}
	if exit := s.o.Machines.Exit(w.ID); !exit.Clean {
		t.Errorf("the guest ended by %q, want that it shut down", exit.Reason)
	}
}

func TestStartThatFailsIsStoppedAgain(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	w := mustCreate(t, s, CreateOptions{Name: "a"})
	if _, err := s.Stop(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	world.failAt = "machine"
	if _, _, err := s.Start(t.Context(), "a"); !errors.Is(err, errInjected) {
		t.Fatalf("start: %v", err)
	}
	wantLeft(t, world, "console "+w.ID, "disk "+w.ID, "record "+w.ID+" stopped")
}

func TestDestroyThatFailedIsRepeated(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	w := mustCreate(t, s, CreateOptions{Name: "a"})
	world.failAt = "disk remove"
	if _, err := s.Destroy(t.Context(), "a"); !errors.Is(err, errInjected) {
		t.Fatalf("destroy: %v", err)
	}
	wantLeft(t, world, "record "+w.ID+" destroying")
	world.failAt = ""
	if _, err := s.Destroy(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, world)
}

// TestDestroyOnFullDisk removes the disk that fills the host, though what is
// intended cannot be recorded before.
func TestDestroyOnFullDisk(t *testing.T) {
	world := newWorld()
	s, _ := world.daemon(t, nil)
	w := mustCreate(t, s, CreateOptions{Name: "a"})
	world.full = true
	if _, err := s.Stop(t.Context(), "a", true); !fault.Is(err, fault.NoSpace) {
		t.Errorf("stop on a full disk: %v", err)
	}
	world.failAt = "disk remove"
	if _, err := s.Destroy(t.Context(), "a"); !errors.Is(err, errInjected) {
		t.Fatalf("destroy: %v", err)
	}
	if got, err := s.Get(t.Context(), w.ID); err != nil || got.State != domain.Running {
		t.Errorf("after a destroy that failed: %+v, %v", got, err)
	}
	world.failAt = ""
	if _, err := s.Destroy(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, world)
}

func TestMachineEnds(t *testing.T) {
	for _, tt := range []struct {
		exit domain.Exit
		want domain.State
	}{
		{domain.Exit{Clean: true, Reason: "guest shut down"}, domain.Stopped},
		{domain.Exit{Reason: "killed by signal 9"}, domain.Failed},
	} {
		t.Run(tt.exit.Reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				world := newWorld()
				s, _ := world.daemon(t, nil)
				w := mustCreate(t, s, CreateOptions{Name: "a"})
				world.dies(w.ID, tt.exit)
				synctest.Wait()
				got, err := s.Get(t.Context(), "a")
				if err != nil || got.State != tt.want || got.Reason != tt.exit.Reason {
					t.Errorf("state is %s (%s), want %s; %v", got.State, got.Reason, tt.want, err)
				}
				wantLeft(t, world, "console "+w.ID, "disk "+w.ID, "record "+w.ID+" "+string(tt.want))
				if _, _, err := s.Start(t.Context(), "a"); err != nil {
					t.Errorf("start again: %v", err)
				}
				if err := s.Close(t.Context(), false); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestCloseLeavesMachinesUnlessAsked(t *testing.T) {
	for _, stop := range []bool{false, true} {
		t.Run(fmt.Sprint(stop), func(t *testing.T) {
			world := newWorld()
			s, _ := world.daemon(t, nil)
			w := mustCreate(t, s, CreateOptions{})
			if err := s.Close(t.Context(), stop); err != nil {
				t.Fatal(err)
			}
			want := []string{"console " + w.ID, "disk " + w.ID}
			if !stop {
				want = append(want, "machine "+w.ID, "record "+w.ID+" running", "slot "+w.ID)
			} else {
				want = append(want, "record "+w.ID+" stopped")
			}
			wantLeft(t, world, want...)
			_, _, err := s.Create(t.Context(), CreateOptions{})
			wantFault(t, err, fault.Unavailable, "shutting down")
		})
	}
}
